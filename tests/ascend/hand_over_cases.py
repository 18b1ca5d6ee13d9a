"""Models for both of Ascend's compilers: what each call gives on the stand-in is what it gives on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import sgl_npu
from sgl_npu.compiler.report import Report

ATTENTION = torch.ops.sgl_npu.attention.default
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCES = {BF16: 3e-2, FP16: 6e-3, FP32: 2e-5}
HEADS, SIZE = 2, 64
WIDTH = HEADS * SIZE
_GENERATOR = torch.Generator().manual_seed(0)  # bfloat16 results of many draws lie near their tolerance, of some beyond


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=_GENERATOR)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def causal(x: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(split(x), split(x), split(x), is_causal=True))


def heads_of_forty(x: Tensor) -> Tensor:
    """No multiple of 16: padded, in a graph in which the head size too is a symbol."""
    q = x.unflatten(-1, (-1, 40)).transpose(1, 2)
    return merge(F.scaled_dot_product_attention(q, q, q, is_causal=True))


def a_piece_without_npu(x: Tensor) -> Tensor:
    count = torch.arange(7).sum()
    torch._dynamo.graph_break()
    return causal(x) * count.item()


def cross(x: Tensor, y: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(split(x), split(y), split(y)))


def padded(x: Tensor, keep: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(split(x), split(x), split(x), keep[:, None, None]))


def written_out(x: Tensor) -> Tensor:
    scores = split(x) @ split(x).mT * SIZE**-0.5
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    return merge(scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ split(x))


def sinks(x: Tensor, sink: Tensor) -> Tensor:
    return merge(ATTENTION(split(x), split(x), split(x), None, None, sink, scale=0.125, upper=0)[0])


def sinks_over_a_cache(x: Tensor, past: Tensor, sink: Tensor) -> Tensor:
    full = torch.cat((past, x), 1)
    upper = full.shape[1] - x.shape[1]
    return merge(ATTENTION(split(x), split(full), split(full), None, None, sink, scale=0.125, upper=upper)[0])


def cache_step(x: Tensor, cache: Tensor, position: Tensor) -> Tensor:
    """A static KV cache: written where the step is, attended up to there."""
    cache.index_copy_(1, position, x)
    keep = torch.arange(cache.shape[1], device=x.device) <= position[:, None]
    return merge(F.scaled_dot_product_attention(split(x), split(cache), split(cache), keep))


def sliced_cache(x: Tensor, cache: Tensor) -> Tensor:
    cache[:, -x.shape[1] :] = x
    return cross(x, cache)


def changed_input(x: Tensor) -> Tensor:
    x.mul_(2)
    return causal(x) + 1


def changed_by_its_transpose(x: Tensor) -> Tensor:
    x.copy_(x - x.transpose(0, 1))
    return x + 1


def aliases(x: Tensor) -> tuple[Tensor, ...]:
    return x, x[:, 1:], x.transpose(1, 2), causal(x)


def same_twice(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = causal(x)
    return out, out, out[0]


def breaks(x: Tensor) -> Tensor:
    out = causal(x + 1)
    torch._dynamo.graph_break()
    return causal(out) * 2


def differences(x: Tensor) -> Tensor:
    """As in transformers' masks of packed sequences."""
    total = x.cumsum(1)
    return total[:, 1:] - total[:, :-1]


def parts(x: Tensor) -> Tensor:
    """A result and what it was joined into: npugraph_ex computes the one inside of the other."""
    doubled = x * 2
    return torch.cat([doubled, x * 3])[1 : x.shape[0] + 1] - doubled


def no_attention(x: Tensor) -> Tensor:
    return F.silu(x @ x.mT).sum(-1)


def no_tensor_work(x: Tensor) -> Tensor:
    return x


def softcapped(x: Tensor) -> Tensor:
    return merge(ATTENTION(split(x), split(x), split(x), scale=0.125, softcap=20.0, upper=0)[0])


def with_lse(x: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = ATTENTION(split(x), split(x), split(x), scale=0.125, upper=0)
    return merge(out), lse


def sinks_with_lse(x: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = ATTENTION(split(x), split(x), split(x), None, None, sink, scale=0.125, upper=0)
    return merge(out), lse


def sinks_with_empty_rows(x: Tensor, y: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = ATTENTION(split(x), split(y), split(y), None, None, sink, scale=0.125, upper=y.shape[1] - x.shape[1])
    return merge(out), lse


def odd_heads(x: Tensor) -> Tensor:
    """A head size that the kernel takes only when it is padded."""
    q = x.unflatten(-1, (-1, 8)).transpose(1, 2)
    return merge(F.scaled_dot_product_attention(q, q, q, is_causal=True))


def two_merged(x: Tensor, y: Tensor) -> Tensor:
    """Attention over two sets of keys, merged by their lse, as ring attention does."""
    (one, lse), (other, more) = (ATTENTION(split(x), split(k), split(k), scale=0.125) for k in (x, y))
    share = torch.sigmoid(lse - more).unsqueeze(-1)
    return merge(one * share + other * (1 - share))


# A case: the function, and the arguments of every call.
CASES: dict[str, tuple[Callable, list[tuple]]] = {
    "causal": (causal, [(rand(2, 24, WIDTH),)]),
    "float16": (causal, [(rand(2, 24, WIDTH, dtype=FP16),)]),
    "float32": (causal, [(rand(2, 24, WIDTH, dtype=FP32),)]),
    "heads that are padded": (heads_of_forty, [(rand(2, n, 120),) for n in (24, 31)]),
    "a piece on the CPU": (a_piece_without_npu, [(rand(2, 24, WIDTH),)]),
    "a batch of one": (causal, [(rand(1, 24, WIDTH),)]),
    "one row after many": (cross, [(rand(2, n, WIDTH), rand(2, m, WIDTH)) for n, m in ((9, 9), (1, 10), (1, 11))]),
    "one token after many": (causal, [(rand(2, n, WIDTH),) for n in (9, 1)]),
    "padding": (padded, [(rand(2, 24, WIDTH), torch.arange(24) < torch.tensor([[24], [15]]))]),
    "written out": (written_out, [(rand(2, n, WIDTH),) for n in (24, 31)]),
    "a static cache": (cache_step, [(rand(2, 1, WIDTH), rand(2, 12, WIDTH), torch.tensor([n])) for n in (4, 5)]),
    "a cache written by slice": (sliced_cache, [(rand(2, n, WIDTH), rand(2, 12, WIDTH)) for n in (4, 5)]),
    "an input that is changed": (changed_input, [(rand(2, 24, WIDTH),)]),
    "an input that is changed by its transpose": (changed_by_its_transpose, [(rand(6, 6, dtype=FP32),)]),
    "outputs that are inputs": (aliases, [(rand(2, 24, WIDTH),)]),
    "one output twice": (same_twice, [(rand(2, 24, WIDTH),)]),
    "inputs with strides": (causal, [(rand(24, 2, WIDTH).transpose(0, 1),), (rand(2, 24, 2 * WIDTH)[..., ::2],)]),
    "a graph break": (breaks, [(rand(2, n, WIDTH),) for n in (24, 17)]),
    "differences": (differences, [(torch.randint(0, 9, (2, n)),) for n in (24, 31)]),
    "parts of what was joined": (parts, [(rand(6, 6, dtype=FP32),)]),
    "no attention": (no_attention, [(rand(2, n, WIDTH, dtype=FP32),) for n in (24, 31)]),
    "nothing to do": (no_tensor_work, [(rand(2, 24, WIDTH),)]),
    "softcap, which no kernel has": (softcapped, [(rand(2, 24, WIDTH),)]),
    "sinks": (sinks, [(rand(2, 24, WIDTH), rand(HEADS, dtype=FP32))]),
}
# Everything that merges results through their lse.
MERGES: dict[str, tuple[Callable, list[tuple]]] = {
    "lse": (with_lse, [(rand(2, 24, WIDTH),)]),
    "sinks and lse": (sinks_with_lse, [(rand(2, 24, WIDTH), rand(HEADS, dtype=FP32))]),
    "sinks and empty rows": (
        sinks_with_empty_rows, [(rand(2, 24, WIDTH), rand(2, 9, WIDTH), rand(HEADS, dtype=FP32))],
    ),
    "sinks and padded heads": (
        lambda x, sink: merge(ATTENTION(*[split(x)[..., :56]] * 3, None, None, sink, scale=0.125, upper=0)[0]),
        [(rand(2, 24, WIDTH), rand(HEADS, dtype=FP32))],
    ),
    "sinks in float32": (sinks_with_lse, [(rand(2, 24, WIDTH, dtype=FP32), rand(HEADS, dtype=FP32))]),
    "two sets of keys": (two_merged, [(rand(2, 24, WIDTH), rand(2, 9, WIDTH))]),
    "bottom right": (
        sinks_over_a_cache, [(rand(2, 5, WIDTH), rand(2, 9, WIDTH), rand(HEADS, dtype=FP32))],
    ),
}  # fmt: skip


# Version 2 of the kernel, which takes sinks in bfloat16 over sequences end to end: lengths are cumulative.
LENGTHS = (24, 31, 9)
PACKED: dict[str, tuple[Callable, list[tuple]]] = {
    "[S, 2S]": (sinks, [(rand(2, n, WIDTH), rand(HEADS)) for n in LENGTHS]),
    "[S + P, 2S + 2P]": (sinks_over_a_cache, [(rand(2, 5, WIDTH), rand(2, n, WIDTH), rand(HEADS)) for n in LENGTHS]),
    "both": (sinks_over_a_cache, [(rand(2, n // 2, WIDTH), rand(2, n, WIDTH), rand(HEADS)) for n in LENGTHS]),
}


def to_npu(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda x: _moved(x), tree)


def _moved(x: Tensor) -> Tensor:
    """With its strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="npu").copy_(x)


def compiled(function: Callable, options: dict[str, Any], **settings: Any) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, backend="sgl_npu", options={"strict": True, **options}, **settings)


def check(function: Callable, calls: Sequence[tuple], options: dict[str, Any], **settings: Any) -> list[Report]:
    """Compile for the NPU and hold every call against eager on the CPU: results, and what became of the arguments.

    Returns the reports of what was compiled.
    """
    before = len(sgl_npu.reports())
    on_device = compiled(function, options, **settings)
    for arguments in calls:
        on_cpu = copy.deepcopy(arguments)
        on_npu = to_npu(arguments)
        with torch.no_grad():
            expected, found = function(*on_cpu), on_device(*on_npu)
        assert_close((found, on_npu), (expected, on_cpu))
    return sgl_npu.reports()[before:]


def recorded(inner: type, monkeypatch: Any) -> list[Any]:
    """Every graph that an inner compiler gets from now on, as it gets it."""
    graphs = []
    compile_part = inner._compile

    def record(self: Any, gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return compile_part(self, gm, inputs)

    monkeypatch.setattr(inner, "_compile", record)
    return graphs


def check_training(model: nn.Module, inputs: Sequence[Tensor], options: dict[str, Any]) -> list[Report]:
    """Two steps of training on the NPU against the CPU: the loss and every gradient."""
    before = len(sgl_npu.reports())
    reference, model = copy.deepcopy(model), model.to("npu")
    on_device = compiled(model, options)
    for x in inputs:
        for run, place in ((reference, "cpu"), (on_device, "npu")):
            given = x.clone().to(place).requires_grad_()
            run(given).float().square().mean().backward()
            results = {name: parameter.grad for name, parameter in run.named_parameters()} | {"input": given.grad}
            if place == "cpu":
                expected = list(results.values())
        found = [x.cpu() for x in results.values()]
        for one, other in zip(found, expected, strict=True):
            tolerance = TOLERANCES[other.dtype]
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
        for run in (reference, on_device):
            run.zero_grad()
    return sgl_npu.reports()[before:]


def check_buffer(options: dict[str, Any]) -> None:
    """The mask in a buffer is changed between calls, in place and by another tensor."""
    model = Block()
    reference, model = copy.deepcopy(model), model.to("npu")
    on_device, x = compiled(model, options), rand(2, 24, WIDTH, dtype=FP32)
    for change in (None, lambda m: m.mask[5].fill_(True), lambda m: setattr(m, "mask", torch.ones_like(m.mask).triu())):
        with torch.no_grad():
            for part in (reference, model) if change else ():
                change(part)
            assert_close(on_device(x.to("npu")), reference(x))


class Sdpa(nn.Module):
    def __init__(self, dtype: torch.dtype = FP32) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split(part) for part in self.project(x).chunk(3, -1))
        return merge(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class Local(nn.Module):
    """Attention whose number of heads is an attribute, as when heads are spread over ranks."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return merge(F.scaled_dot_product_attention(heads, heads, heads, is_causal=True))


def check_head_counts(options: dict[str, Any]) -> list[Report]:
    """20 heads, then 5, each with several lengths: a report per count."""
    model, before = Local(20), len(sgl_npu.reports())
    on_device = compiled(model, options, dynamic=True)
    for heads in (20, 5):
        model.heads = heads
        for length in (24, 33):
            x = rand(2, length, heads * 16)
            with torch.no_grad():
                assert_close(on_device(x.to("npu")), model(x))
    return sgl_npu.reports()[before:]


def fia_argument(report: Report, name: str) -> str | None:
    """The text of an argument of the one fused attention in a report's graph."""
    (line,) = (line for line in report.graph.splitlines() if " = npu.npu_fused_infer_attention_score" in line)
    _, found, rest = line.partition(f" {name}=")
    return rest.partition(",")[0].rstrip(")") if found else None


def bad_settings(name: str, known: str, near: str, wrong: tuple[str, Any, str]) -> list[tuple[dict, str]]:
    """Bad inner_options with what the one error says; `near` is a misspelling of `known`."""
    path, value, rule = wrong
    place = f"{name}.CompilerConfig"
    return [
        ({near: True}, f"inner_options: {near!r} is not a setting of {place}; did you mean {known!r}?"),
        ({"zzz": 1}, f"inner_options: 'zzz' is not a setting of {place}; known are "),
        ({"zzz.type": 1}, f"inner_options: 'zzz.type' is not a setting of {place}; known are "),
        ({f"{known}.zzz": 1}, f"inner_options: '{known}.zzz' is not a setting of {place}; did you mean {known!r}?"),
        ({"": 1}, f"inner_options: '' is not a setting of {place}; known are "),
        (
            {"mode": "reduce-overhead"},
            f"inner_options: mode = 'reduce-overhead': inner = {name!r} has chosen it; leave",
        ),
        ({known: "yes"}, f"inner_options: {known} = 'yes': {place} says: Value 'yes' "),
        ({path: value}, f"inner_options: {path} = {value!r}: {place} says: {rule}"),
        ({"post_grad_custom_pre_pass": 3}, "post_grad_custom_pre_pass = 3: " + f"{place} says: value must be Callable"),
        ({1: 2}, "inner_options.1.[key] = 1: input should be a valid string"),
    ]


def assert_close(found: Any, expected: Any) -> None:
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(y, Tensor):
            assert x.device.type == "npu"
            tolerance = TOLERANCES.get(y.dtype, 0)
            torch.testing.assert_close(x.cpu(), y, atol=tolerance, rtol=tolerance)
        else:
            assert x == y


class Block(nn.Module):
    """A layer with a mask in a buffer, as GPT-2 has it."""

    def __init__(self, dtype: torch.dtype = FP32) -> None:
        super().__init__()
        self.project, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril(), persistent=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split(part) for part in self.project(x).chunk(3, -1))
        length = x.shape[1]
        scores = query @ key.mT * SIZE**-0.5
        scores = torch.where(self.mask[:length, :length], scores, torch.finfo(scores.dtype).min)
        return x + self.output(merge(scores.softmax(-1) @ value))
