"""What a kernel row is: a name, the op it ends in, a reason to refuse a call, and the torch code that replaces it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sgl_npu.runtime.sizes import Size, guard, known, specialise


@dataclass(frozen=True)
class AttentionCall:
    """One canonical attention: its tensors (fake when a row judges it, traced when a row emits it) and its setting.

    Shapes are those of `sgl_npu.runtime.attention`. `platform` names whose kernels there are, `inner` the compiler that
    will get the graph.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    lower: Size | None = None
    upper: Size | None = None
    needs_lse: bool = False
    platform: str = "cpu"
    inner: str = "inductor"

    def with_band(self, lower: Size | None, upper: Size | None) -> AttentionCall:
        return replace(self, lower=lower, upper=upper)


@dataclass(frozen=True)
class Kernel:
    """A row of a platform's table.

    `refuse` returns None or the clause of the kernel's limits that the call breaks; `emit` is traced in place of the
    canonical node and returns (out, lse), lse None unless `call.needs_lse`. `op` is what the report names. A row that
    exists for special calls says which by `applies`, and is passed over in silence for all others; `refuse` is right
    without it.
    """

    name: str
    op: str
    refuse: Callable[[AttentionCall], str | None]
    emit: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]
    applies: Callable[[AttentionCall], bool] = lambda call: True


@dataclass(frozen=True)
class BackwardCall:
    """The backward of one canonical attention; gradients of `out` and `lse` are None where nothing flows back."""

    forward: AttentionCall
    grad_out: Tensor | None
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor
    bias_grad: bool = False
    sinks_grad: bool = False


@dataclass(frozen=True)
class BackwardKernel:
    """A row of a platform's backward table; `emit` returns the five gradients of `sgl_npu::attention_backward`."""

    name: str
    op: str
    refuse: Callable[[BackwardCall], str | None]
    emit: Callable[[BackwardCall], tuple[Tensor, ...]]


def open_band(call: AttentionCall) -> AttentionCall:
    """The call without the sides of the band that exclude nothing: `j - i` runs from 1 - Sq to Skv - 1."""
    lower, upper = call.lower, call.upper
    if upper is not None and known(upper >= call.key.size(2) - 1):
        upper = None
    if lower is not None and known(lower <= 1 - call.query.size(2)):
        lower = None
    return call.with_band(lower, upper)


def is_empty(call: AttentionCall) -> bool:
    """No query, no key or no batch: fused kernels are not asked to handle those."""
    return any(guard(size == 0) for size in (*call.query.shape[:3], call.key.size(2)))


def head_counts(call: AttentionCall) -> tuple[int, int]:
    """Heads of the query and of the key, for op arguments of type int, which take no symbol.

    torch.compile(dynamic=True) makes them symbols where they are read off a module that changes, as when heads are
    spread over ranks. Each count gets a graph of its own; the lengths in it stay symbols.
    """
    return specialise(call.query.size(1)), specialise(call.key.size(1))


def four_dims(x: Tensor) -> Tensor:
    """A tensor that broadcasts to (B, Hq, Sq, Skv), with all four dimensions."""
    return x if x.dim() == 4 else x[(None,) * (4 - x.dim())]


def additive_mask(call: AttentionCall, keep: Tensor | None) -> Tensor | None:
    """`keep` (bool, True = may attend) and the bias as one additive mask, 4-D, not expanded.

    Its dtype is the query's, or float32 where the bias is more precise than the query.
    """
    mask = call.bias
    if mask is not None and mask.dtype != call.query.dtype:
        mask = mask.to(torch.promote_types(call.query.dtype, torch.float32))
    if keep is not None:
        zero = torch.zeros((), dtype=call.query.dtype, device=keep.device) if mask is None else mask
        mask = torch.where(keep, zero, float("-inf"))
    return None if mask is None else four_dims(mask)


def with_sinks(emit: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]):
    """Give sinks to a kernel that has none: exp(sink) joins the softmax denominator, exactly, through the lse."""

    def emit_with_sinks(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if call.sinks is None:
            return emit(call)
        out, lse = emit(replace(call, sinks=None, needs_lse=True))
        assert lse is not None
        sink = call.sinks.to(lse.dtype).view(1, -1, 1)
        share = torch.sigmoid(lse - sink).masked_fill(lse == -math.inf, 0.0)
        out = (out * share.unsqueeze(-1)).to(out.dtype)
        if not call.needs_lse:
            return out, None
        top = torch.maximum(lse, sink)
        top = top.masked_fill(top == -math.inf, 0.0)
        return out, top + torch.log(torch.exp(lse - top) + torch.exp(sink - top))

    return emit_with_sinks
