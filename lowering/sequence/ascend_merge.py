"""The merge of partial attentions on Ascend: one npu_attention_update in the place of exponentials, products and sums.

The op takes flat rows. What it gives for an lse of -inf is not documented, so it gets every lse less the largest of its
row, and in the place of -inf a number so small that the weight is 0: what `merge` computes, to the last empty row.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sgl_npu.lowering.sequence.merge import Part
from sgl_npu.runtime.attention import compute_dtype
from sgl_npu.runtime.npu import ensure_ops
from sgl_npu.runtime.npu.attention_update import ATTENTION_UPDATE_RULES, OP, AttentionUpdateCall
from sgl_npu.runtime.npu.rule import broken_rules
from sgl_npu.runtime.sizes import known

# In a row without any key all weight is the first part's: its out is 0 there, those of other parts may be anything.
_FIRST_EMPTY, _OTHER_EMPTY = -1e30, -2e30
_LOWEST = torch.finfo(torch.float32).min


def refuse_update(parts: list[Part]) -> str | None:
    """Why the op cannot merge these parts; None if it can."""
    ensure_ops()
    if not hasattr(torch.ops.npu, OP):
        return f"torch_npu has no {OP}: it is older than the op"
    rows, count = parts[0].lse.numel(), len(parts)
    call = AttentionUpdateCall(
        lses=((rows,),) * count,
        outs=((rows, parts[0].out.size(3)),) * count,
        lse_dtypes=tuple(part.lse.dtype for part in parts),
        out_dtypes=tuple(compute_dtype(part.out.dtype) for part in parts),
    )
    return next((sentence for _, sentence in broken_rules(call, ATTENTION_UPDATE_RULES)), None)


def update(parts: list[Part], has_strides: bool = True) -> Part:
    """`merge` of at least two parts. Where the first one has no key its out must be 0, as attention gives it.

    `has_strides`: whether a transpose is a view to the compiler. GE moves the numbers, so rows are flat as they are.
    """
    heads_last = has_strides and known(parts[0].out.stride(1) <= parts[0].out.stride(2))
    lses = [_rows(part.lse, heads_last) for part in parts]
    outs = [_rows(part.out.to(compute_dtype(part.out.dtype)), heads_last) for part in parts]
    top = functools.reduce(torch.maximum, lses).clamp_min(_LOWEST)
    floors = [_FIRST_EMPTY] + [_OTHER_EMPTY] * (len(parts) - 1)
    below = [(lse - top).clamp_min(floor) for lse, floor in zip(lses, floors, strict=True)]
    out, lse = torch.ops.npu.npu_attention_update.default(below, outs, 1)
    lse = torch.where(lse <= _FIRST_EMPTY, -math.inf, lse + top)
    return Part(_unflattened(out, parts[0].out, heads_last), _unflattened(lse, parts[0].lse, heads_last))


def _rows(x: Tensor, heads_last: bool) -> Tensor:
    """(B, H, S, ...) as (B H S, ...), or as (B S H, ...) where that is the order in memory."""
    x = x.transpose(1, 2) if heads_last else x
    return x.reshape(x.size(0) * x.size(1) * x.size(2), *x.shape[3:]).contiguous()


def _unflattened(x: Tensor, like: Tensor, heads_last: bool) -> Tensor:
    batch, heads, length = like.shape[:3]
    sizes = (batch, length, heads) if heads_last else (batch, heads, length)
    x = x.view(*sizes, *x.shape[1:])
    return x.transpose(1, 2) if heads_last else x
