"""Random spellings of attention: equal to eager when compiled, matched or refused, and never an error."""

import math
import os

import compiled_report
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sgl_npu

compile_for = compiled_report.compile_for

PROGRAMS = int(os.environ.get("SGL_NPU_FUZZ", "200"))  # of all settings together; `make nightly` asks for more
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SCALES = ("none", "mul", "div", "query", "key", "baddbmm", "tensor", "mask first")
MASKS = (
    "none", "masked_fill", "where", "add", "bias", "bias and mask", "padding", "arithmetic", "multiplied", "triu",
    "window", "empty rows",
)  # fmt: skip
LAYOUTS = ("bhsd", "bsnd", "packed", "three dims", "einsum", "grouped einsum")
SOFTMAXES = ("softmax", "softmax", "exp", "exp without shift", "divided later")
GUARDS = ("none", "none", "nan_to_num", "isnan", "again", "head mask", "rows")


@st.composite
def cases(draw):
    return {
        "scale": draw(st.sampled_from(SCALES)),
        "mask": draw(st.sampled_from(MASKS)),
        "fill": draw(st.sampled_from(["-inf", "min", "-1e4"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": draw(st.sampled_from(list(TOLERANCES))),
        "upcast": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 4.0])),
        "sinks": draw(st.sampled_from([False, False, True])),
        "shift": draw(st.booleans()),
        "softmax": draw(st.sampled_from(SOFTMAXES)),
        "guard": draw(st.sampled_from(GUARDS)),
        "group": draw(st.sampled_from([1, 1, 2])),
        "batch": draw(st.integers(1, 3)),
        "kv_heads": draw(st.integers(1, 3)),
        "rows": draw(st.sampled_from([1, 2, 5, 16])),
        "more_keys": draw(st.sampled_from([0, 0, 1, 7])),
        "dim": draw(st.sampled_from([8, 16])),
    }


class Attention:
    """One spelling, made of the parts that a case names."""

    def __init__(self, case):
        self.case = case
        self.scale = case["dim"] ** -0.5

    def __call__(self, q, k, v, padding):
        case = self.case
        batch, heads, rows, dim = q.shape
        folded = case["group"] > 1 and case["layout"] == "grouped einsum"
        if case["group"] > 1 and not folded:
            k, v = (x.repeat_interleave(case["group"], dim=1) for x in (k, v))
        q = q * self.scale if case["scale"] == "query" else q
        k = k * self.scale if case["scale"] == "key" else k
        scores = self.product(q, k, folded)
        if case["scale"] == "mask first":
            scores = self.masked(scores, padding) * self.scale
        else:
            scores = self.masked(self.scaled(scores), padding)
        p, total = self.softmax(scores, heads)
        p = p if total is not None else self.guarded(p, padding)
        if folded:
            p = p.unflatten(1, (-1, case["group"]))
            out = torch.einsum("bgnst,bgtd->bgnsd", p, v).flatten(1, 2)
        elif case["layout"] == "three dims":
            out = torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(batch, heads, rows, dim)
        else:
            out = torch.einsum("bhqk,bhkd->bhqd", p, v) if case["layout"] == "einsum" else p @ v
        out = out if total is None else out / total
        return out if case["layout"] == "three dims" else out.transpose(1, 2).flatten(2)

    def product(self, q, k, folded):
        case = self.case
        if folded:
            return torch.einsum("bgnsd,bgtd->bgnst", q.unflatten(1, (-1, case["group"])), k).flatten(1, 2)
        if case["scale"] == "baddbmm":
            zero = q.new_zeros(1, 1, 1)
            flat = torch.baddbmm(zero, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=self.scale)
            return flat.view(*q.shape[:3], k.shape[2])
        if case["layout"] == "three dims":
            return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(*q.shape[:3], k.shape[2])
        return torch.einsum("bhqd,bhkd->bhqk", q, k) if case["layout"] == "einsum" else q @ k.transpose(-2, -1)

    def scaled(self, scores):
        how = self.case["scale"]
        if how == "mul":
            scores = scores * self.scale
        elif how == "div":
            scores = scores / (1 / self.scale)
        elif how == "tensor":
            scores = scores * torch.linspace(0.1, 0.5, scores.shape[1], dtype=scores.dtype)[:, None, None]
        cap = self.case["softcap"]
        return cap * torch.tanh(scores / cap) if cap else scores

    def kept(self, rows, keys, padding):
        """Which keys the mask of the case leaves to each query."""
        case, distance = self.case, torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows)
        keep = (distance <= 0) & (distance > -4) if case["mask"] == "window" else distance <= 0
        if case["mask"] == "padding":
            return keep & padding[:, None, None, :]
        return keep & padding.flip(-1)[:, None, None, :] if case["mask"] == "empty rows" else keep

    def masked(self, scores, padding):
        case, (rows, keys) = self.case, scores.shape[-2:]
        low = {"-inf": -math.inf, "min": torch.finfo(scores.dtype).min, "-1e4": -1e4}[case["fill"]]
        keep = self.kept(rows, keys, padding)
        bias = torch.linspace(-1, 1, rows * keys, dtype=scores.dtype).view(rows, keys)
        if case["mask"] in ("masked_fill", "padding", "window", "empty rows"):
            return scores.masked_fill(~keep, low)
        if case["mask"] == "where":
            return torch.where(keep, scores, torch.full((), low, dtype=scores.dtype))
        if case["mask"] == "triu":
            return scores + torch.full((rows, keys), low, dtype=scores.dtype).triu(keys - rows + 1)
        number, finite = keep.to(scores.dtype), -3e4
        if case["mask"] == "arithmetic":
            return scores + (1 - number) * finite
        if case["mask"] == "multiplied":
            return scores * number + finite * (1 - number)
        additive = torch.zeros(rows, keys, dtype=scores.dtype).masked_fill(~keep, low)
        return scores + {"add": additive, "bias": bias, "bias and mask": bias + additive}.get(case["mask"], 0.0)

    def softmax(self, scores, heads):
        """Probabilities, or exponentials and what they are still to be divided by."""
        case = self.case
        dtype = torch.float32 if case["upcast"] else scores.dtype
        if case["softmax"] != "softmax" and not case["sinks"]:
            top = scores.amax(-1, keepdim=True).clamp(min=-1e4) if case["softmax"] == "exp" else 0.0
            weights = torch.exp((scores - top if case["softmax"] == "exp" else scores).to(dtype)).to(scores.dtype)
            total = weights.sum(-1, keepdim=True)
            return (weights, total) if case["softmax"] == "divided later" else (weights / total, None)
        if case["sinks"]:
            sinks = torch.linspace(-1, 1, heads, dtype=scores.dtype).view(1, -1, 1, 1)
            scores = torch.cat([scores, sinks.expand(*scores.shape[:1], -1, scores.shape[2], -1)], -1)
        if case["shift"]:
            scores = scores - scores.max(-1, keepdim=True).values
        p = scores.softmax(-1, dtype=dtype).to(scores.dtype)
        return (p[..., :-1] if case["sinks"] else p), None

    def guarded(self, p, padding):
        how, keep = self.case["guard"], self.kept(*p.shape[-2:], padding)
        if how == "nan_to_num":
            return torch.nan_to_num(p)
        if how == "isnan":
            return torch.where(torch.isnan(p), 0.0, p)
        if how == "again" and self.case["mask"] in ("masked_fill", "padding", "empty rows"):
            return p.masked_fill(~keep, 0.0)
        if how == "head mask":
            return p * torch.linspace(0, 1, p.shape[1], dtype=p.dtype).view(-1, 1, 1)
        return torch.where(keep.any(-1, keepdim=True), p, 0.0) if how == "rows" else p


def tensors(case):
    generator = torch.Generator().manual_seed(0)
    batch, rows, keys, dim = case["batch"], case["rows"], case["rows"] + case["more_keys"], case["dim"]
    kv_heads, heads = case["kv_heads"], case["kv_heads"] * case["group"]
    padding = torch.ones(batch, keys, dtype=torch.bool)
    padding[-1, keys // 2 + 1 : keys - 1] = False

    def dense(length, count):
        if case["layout"] == "bsnd":
            return torch.randn((batch, length, count, dim), generator=generator).to(case["dtype"]).transpose(1, 2)
        if case["layout"] == "packed":
            packed = torch.randn((batch, length, 3, count, dim), generator=generator).to(case["dtype"])
            return packed.permute(2, 0, 3, 1, 4)[1]
        return torch.randn((batch, count, length, dim), generator=generator).to(case["dtype"])

    return dense(rows, heads), dense(keys, kv_heads), dense(keys, kv_heads), padding


SETTINGS = {("cpu", False): 0.3, ("npu", False): 0.2, ("cpu", True): 0.2}  # the share of the programs


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "dynamic"), SETTINGS)
def test_random_spellings_equal_eager(platform, dynamic):
    found = {"matched": 0, "refused": 0}

    @settings(max_examples=int(PROGRAMS * SETTINGS[platform, dynamic]), deadline=None, derandomize=True, database=None)
    @given(cases())
    def check(case):
        before, function, args = len(sgl_npu.reports()), Attention(case), tensors(case)
        for x in args[:3]:
            torch._dynamo.mark_static(x, [1, 3])
        with torch.no_grad():
            expected = function(*args)
            got = compile_for(function, platform, dynamic=dynamic)(*args)
        tolerance = TOLERANCES[case["dtype"]]
        rows = ~expected.isnan()  # NaN for a row without keys, where the canonical op has 0
        torch.testing.assert_close(got[rows], expected[rows], atol=tolerance, rtol=tolerance)
        for record in (site for report in sgl_npu.reports()[before:] for site in report.sites):
            assert record.kernel or record.refusals[0][0] == "match", record
            found["matched" if record.kernel else "refused"] += 1

    check()
    assert found["matched"] > (1 if dynamic else 4) * found["refused"], found
