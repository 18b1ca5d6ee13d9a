"""The canonical op against its contract: torch.library.opcheck, a formula spelled in loops, its messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from sgl_npu.runtime.attention import attention

NINF = -math.inf


def formula(query, key, value, mask=None, bias=None, sinks=None, *, scale, softcap=0.0, lower=None, upper=None):
    """(out, lse) of the op's docstring in float64, head by head, differentiable, NaN-free for empty rows."""
    batch, heads, rows, _ = query.shape
    columns, group = key.size(2), heads // key.size(1)
    keep = torch.ones(batch, heads, rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            if (lower is not None and j - i < lower) or (upper is not None and j - i > upper):
                keep[:, :, i, j] = False
    keep = keep if mask is None else keep & mask
    outs, lses = [], []
    for h in range(heads):
        score = query[:, h].double() @ key[:, h // group].double().mT * scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias.double().expand(batch, heads, rows, columns)[:, h]
        score = torch.where(keep[:, h], score, NINF)
        if sinks is not None:
            score = torch.cat([score, sinks[h].double().expand(batch, rows, 1)], -1)
        alive = (score > NINF).any(-1)
        score = torch.where(alive.unsqueeze(-1), score, 0.0)
        weight = torch.where(alive.unsqueeze(-1), torch.softmax(score, -1), 0.0)[..., :columns]
        outs.append(weight @ value[:, h // group].double())
        total = torch.logsumexp(score, -1) if score.size(-1) else torch.zeros(batch, rows, dtype=torch.float64)
        lses.append(torch.where(alive, total, NINF))
    return torch.stack(outs, 1), torch.stack(lses, 1)


def tensors(b=2, hq=4, hkv=2, sq=5, skv=7, d=8, dv=None, dtype=torch.float64, bsnd=False, grad=False):
    torch.manual_seed(0)

    def make(heads, length, dim):
        if bsnd:
            return torch.randn(b, length, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_(grad)
        return torch.randn(b, heads, length, dim, dtype=dtype, requires_grad=grad)

    return make(hq, sq, d), make(hkv, skv, d), make(hkv, skv, dv or d)


def keep(*shape):
    torch.manual_seed(1)
    return torch.rand(shape) > 0.4


def floats(*shape, dtype=torch.float64, grad=False):
    torch.manual_seed(2)
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


CASES = {
    "gqa": (tensors(), {}),
    "mqa": (tensors(hkv=1), {"upper": 0}),
    "mha": (tensors(hkv=4), {"upper": 2}),
    "lower": (tensors(), {"lower": -1}),
    "band": (tensors(), {"lower": -2, "upper": 1}),
    "rows above the band are empty": (tensors(), {"lower": 4}),
    "rows below the band are empty": (tensors(), {"upper": -2}),
    "mask per key": (tensors(), {"mask": keep(7)}),
    "mask (Sq, Skv)": (tensors(), {"mask": keep(5, 7)}),
    "mask (B, 1, 1, Skv)": (tensors(), {"mask": keep(2, 1, 1, 7), "upper": 2}),
    "mask (B, 1, Sq, 1)": (tensors(), {"mask": keep(2, 1, 5, 1)}),
    "mask (1, Hq, 1, Skv)": (tensors(), {"mask": keep(1, 4, 1, 7)}),
    "mask (B, Hq, Sq, Skv)": (tensors(), {"mask": keep(2, 4, 5, 7)}),
    "mask of nothing": (tensors(), {"mask": torch.zeros(5, 7, dtype=torch.bool)}),
    "bias": (tensors(), {"bias": floats(4, 5, 7)}),
    "bias of another dtype": (tensors(dtype=torch.bfloat16), {"bias": floats(5, 7)}),
    "softcap": (tensors(), {"softcap": 3.0, "scale": 0.5}),
    "sinks": (tensors(), {"sinks": floats(4), "upper": 0}),
    "all at once": (
        tensors(grad=True),
        {
            "mask": keep(2, 1, 1, 7),
            "bias": floats(1, 4, 5, 7, grad=True),
            "sinks": floats(4, grad=True),
            "softcap": 2.0,
            "lower": -3,
            "upper": 2,
        },
    ),
    "Dv != D": (tensors(dv=3), {"upper": 0}),
    "Dv != D, BSND": (tensors(dv=3, bsnd=True), {"upper": 0}),
    "one query": (tensors(sq=1), {"upper": 6}),
    "no key": (tensors(skv=0), {}),
    "no key, sinks": (tensors(skv=0, grad=True), {"sinks": floats(4, grad=True)}),
    "no query": (tensors(sq=0), {}),
    "no batch": (tensors(b=0, grad=True), {"upper": 0}),
    "BSND": (tensors(bsnd=True, grad=True), {"upper": 0}),
    "expanded query": ((torch.randn(1, 1, 5, 8).expand(2, 4, 5, 8), *tensors(dtype=torch.float32)[1:]), {}),
    "float16": (tensors(dtype=torch.float16, grad=True), {"upper": 0}),
    "bfloat16": (tensors(dtype=torch.bfloat16, grad=True), {"upper": 0}),
    "float32": (tensors(dtype=torch.float32, grad=True), {"upper": 0}),
    "grad": (tensors(grad=True), {"mask": keep(2, 1, 5, 7)}),
}


def split(case):
    qkv, options = CASES[case]
    named = {"scale": 0.35, **options}
    return (*qkv, *(named.pop(name, None) for name in ("mask", "bias", "sinks"))), named


@pytest.mark.parametrize("case", CASES)
def test_opcheck_accepts_schema_fake_kernel_autograd_and_dynamic_shapes(case):
    args, kwargs = split(case)
    torch.library.opcheck(attention, args, kwargs)


@pytest.mark.parametrize("case", CASES)
def test_out_and_lse_are_those_of_the_formula(case):
    args, kwargs = split(case)
    out, lse = attention(*args, **kwargs)
    expected, expected_lse = formula(*args, **kwargs)
    half = out.dtype in (torch.float16, torch.bfloat16)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if half else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, **tolerance)
    assert out.dtype == args[0].dtype and lse.is_contiguous()
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    assert out.transpose(1, 2).is_contiguous() or "BSND" not in case


@st.composite
def calls(draw):
    b, group, hkv = (draw(st.integers(1, 2)) for _ in range(3))
    sq, skv, d, dv = (
        draw(st.integers(1, 6)),
        draw(st.integers(0, 7)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    full = (b, hkv * group, sq, skv)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def shape():
        size = tuple(n if draw(st.booleans()) else 1 for n in full)
        return size[draw(st.integers(0, 3)) :]

    args = [randn(b, hkv * group, sq, d), randn(b, hkv, skv, d), randn(b, hkv, skv, dv), None, None, None]
    if draw(st.booleans()):
        args[3] = randn(*shape()) > draw(st.sampled_from((-0.5, 0.5, 9.0)))
    if draw(st.booleans()):
        bias = randn(*shape())
        args[4] = bias.masked_fill(bias > draw(st.sampled_from((0.3, 9.0))), NINF)
    if draw(st.booleans()):
        args[5] = randn(hkv * group).masked_fill(randn(hkv * group) > 1.5, NINF)
    side = st.none() | st.integers(-8, 8)
    cap = draw(st.sampled_from((0.0, 0.5, 5.0)))
    return args, {"scale": draw(st.floats(-2, 2)), "softcap": cap, "lower": draw(side), "upper": draw(side)}


def loss(result):
    """A number that every element of out and every finite lse moves differently."""
    out, lse = (x.double() for x in result)
    lse = torch.where(lse > NINF, lse, 0.0)
    weight = torch.arange(1, out.numel() + 1, dtype=torch.float64).reshape(out.shape).sin()
    weight_lse = torch.arange(1, lse.numel() + 1, dtype=torch.float64).reshape(lse.shape).cos()
    return (out * weight).sum() + (lse * weight_lse).sum()


def gradients(function, args, kwargs, of=loss):
    args = [x.detach().clone().requires_grad_(x.is_floating_point()) if x is not None else None for x in args]
    wanted = [x for x in args if x is not None and x.requires_grad]
    grads = torch.autograd.grad(of(function(*args, **kwargs)), wanted, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, grads, strict=True)]


@given(calls())
@settings(derandomize=True, max_examples=80, deadline=None)
def test_any_call_and_its_gradients_agree_with_the_formula(call):
    args, kwargs = call
    for got, expected in zip(attention(*args, **kwargs), formula(*args, **kwargs), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-8)
    for got, expected in zip(gradients(attention, *call), gradients(formula, *call), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


BIAS_SHAPES = [
    (7,),
    (1, 7),
    (5, 1),
    (5, 7),
    (4, 1, 1),
    (1, 5, 7),
    (2, 1, 1, 7),
    (1, 4, 1, 7),
    (2, 1, 5, 7),
    (2, 4, 5, 7),
]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_gradient_is_summed_to_the_shape_of_the_bias(shape):
    call = (*tensors(), None, floats(*shape), None), {"scale": 0.3, "upper": 1}
    for got, expected in zip(gradients(attention, *call), gradients(formula, *call), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("of", [lambda r: r[0].sum() ** 2, lambda r: r[1].exp().sum()], ids=["out alone", "lse alone"])
def test_gradient_through_one_output_alone(of):
    call = (*tensors(), None, None, floats(4)), {"scale": 0.3, "softcap": 2.0, "upper": 0}
    for got, expected in zip(gradients(attention, *call, of), gradients(formula, *call, of), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_empty_rows_are_zero_with_lse_minus_infinity_and_gradients_of_zero(dtype):
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 1] = False
    mask[1] = False
    args = (*tensors(dtype=dtype), mask, floats(5, 7, dtype=dtype), None)
    out, lse = attention(*args, scale=0.3)
    empty = ~mask.any(-1).expand(2, 4, 5)
    assert (out[empty] == 0).all() and (lse[empty] == NINF).all() and lse[~empty].isfinite().all()
    query, key, value, bias = gradients(attention, args, {"scale": 0.3})
    assert all(grad.isfinite().all() for grad in (query, key, value, bias))
    assert (query[empty] == 0).all() and (key[1] == 0).all() and (value[1] == 0).all()


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_band_sides_of_symbolic_lengths_compile_once(side):
    def run(query, key, value):
        edge = key.size(2) - query.size(2) if side == "upper" else query.size(2) - key.size(2)
        return attention(query, key, value, scale=0.3, **{side: edge})

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, dynamic=True)
    for sq, skv in ((5, 9), (3, 12), (6, 6), (4, 7)):
        args = tensors(sq=sq, skv=skv)
        for got, expected in zip(compiled(*args), run(*args), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


Q, K, V = tensors(dtype=torch.float32)
ERRORS = {
    "must be \\(B, H, S, D\\), got 3, 4 and 4": {"query": Q[0]},
    "batch sizes differ": {"query": Q[:1]},
    "query and key head sizes differ": {"key": K[..., :4]},
    "key and value batch sizes differ": {"value": V[:1]},
    "key and value head counts differ": {"value": V[:, :1]},
    "key and value lengths differ": {"value": V[:, :, :3]},
    "multiple of key heads": {"key": K.repeat(1, 2, 1, 1)[:, :3], "value": V.repeat(1, 2, 1, 1)[:, :3]},
    "share a floating dtype, got torch.float64": {"query": Q.double()},
    "share a floating dtype, got torch.int64": {"query": Q.long(), "key": K.long(), "value": V.long()},
    "mask must be bool .* got torch.float32; pass additive masks as bias": {"mask": torch.zeros(5, 7)},
    "mask \\(5, 6\\) does not broadcast to \\(2, 4, 5, 7\\)": {"mask": keep(5, 6)},
    "mask \\(1, 2, 4, 5, 7\\) does not broadcast": {"mask": keep(1, 2, 4, 5, 7)},
    "bias \\(2, 2, 5, 7\\) does not broadcast": {"bias": floats(2, 2, 5, 7)},
    "bias must be floating, got torch.bool": {"bias": keep(5, 7)},
    "sinks must be \\(4,\\), one per query head, got \\(2,\\)": {"sinks": floats(2)},
    "sinks must be \\(4,\\), one per query head, got \\(4, 1\\)": {"sinks": floats(4, 1)},
    "softcap must be 0 \\(none\\) or positive, got -1.0": {"softcap": -1.0},
}


@pytest.mark.parametrize("message", ERRORS)
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_call_outside_the_contract_says_which_rule_it_breaks(message, mode):
    call = {"query": Q, "key": K, "value": V, "mask": None, "bias": None, "sinks": None} | ERRORS[message]
    options = {"softcap": call.pop("softcap", 0.0)}
    with pytest.raises(ValueError, match=message):
        if mode == "real":
            attention(*call.values(), **options)
        else:
            with torch._subclasses.FakeTensorMode() as fake:
                attention(*(x if x is None else fake.from_tensor(x) for x in call.values()), **options)


def test_gradients_of_a_row_under_a_huge_finite_mask_are_those_of_its_softmax():
    q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    bias = torch.zeros(6, 6)
    bias[:2] = -1e9
    weight = torch.randn(1, 2, 6, 4)
    got = torch.autograd.grad((attention(q, k, v, None, bias, scale=0.5)[0] * weight).sum(), (q, k, v))
    expected = torch.autograd.grad(
        (torch.softmax(q @ k.transpose(-1, -2) * 0.5 + bias, dim=-1) @ v * weight).sum(), (q, k, v)
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
