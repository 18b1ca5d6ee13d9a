"""How a band and a mask become the sparse_mode, atten_mask and pse_shift of Ascend's attention ops.

Positions kept by each mode, S1 query rows and S2 keys (op-plugin docs: npu_fused_infer_attention_score.md):

    0  everything that a dense atten_mask does not remove      3  j <= i + S2 - S1
    2  j <= i                                                  4  i + S2 - S1 - pre <= j <= i + S2 - S1 + next

atten_mask is True where a key is *removed*. Modes 2, 3 and 4 all take one fixed 2048 x 2048 upper triangle.
With one query row the modes have no effect on the hardware, so a band that cuts keys there becomes a dense mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, four_dims, open_band
from sgl_npu.runtime.attention import keep_mask
from sgl_npu.runtime.sizes import Size, guard, known

INT_MAX = 2147483647


@dataclass(frozen=True)
class AscendMask:
    """Mask arguments as both ops name them, and whether rows may be left without any key."""

    sparse_mode: int = 0
    atten_mask: Tensor | None = None
    pse_shift: Tensor | None = None
    pre_tokens: int = INT_MAX
    next_tokens: int = INT_MAX
    empty_rows: bool = False


def ascend_mask(call: AttentionCall) -> AscendMask:
    """The cheapest form that says exactly what the call's band, mask and bias say."""
    call = open_band(call)
    pse = _pse_shift(call)
    if call.mask is None:
        compact = _compact(call)
        if compact is not None:
            mode, before, after = compact
            return AscendMask(
                mode,
                None if mode == 0 else triangle(call.query.device),
                pse,
                before,
                after,
                empty_rows=pse is not None or not _every_row_keeps_a_key(call),
            )
    keep = keep_mask(call.query, call.key, call.mask, call.lower, call.upper)
    assert keep is not None
    return AscendMask(0, _dense(call, keep), pse, empty_rows=True)


def triangle(device: torch.device) -> Tensor:
    """The mask of modes 2, 3 and 4."""
    return torch.ones((2048, 2048), dtype=torch.bool, device=device).triu(1)


def _compact(call: AttentionCall) -> tuple[int, int, int] | None:
    """(sparse_mode, pre_tokens, next_tokens) where no dense mask is needed."""
    lower, upper = call.lower, call.upper
    if lower is None and upper is None:
        return 0, INT_MAX, INT_MAX
    rows, keys = call.query.size(2), call.key.size(2)
    if guard(rows == 1):
        return None
    if lower is None and upper is not None:
        if known(upper == 0):
            return 2, INT_MAX, INT_MAX
        if known(upper == keys - rows):
            return 3, INT_MAX, INT_MAX
    before = INT_MAX if lower is None else _constant(keys - rows - lower)
    after = INT_MAX if upper is None else _constant(upper - (keys - rows))
    if before is None or after is None:
        return None
    inside = before + after >= 0 and guard(before > -rows) and guard(after > -keys)  # the op's limits of a window
    return (4, before, after) if inside else None


def _constant(size: Size) -> int | None:
    """A size as a number, if it is the same for every shape."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else None


def _every_row_keeps_a_key(call: AttentionCall) -> bool:
    """The band reaches a key from the first row and from the last, and is not empty between its sides."""
    rows, keys = call.query.size(2), call.key.size(2)
    lower, upper = call.lower, call.upper
    first = upper is None or guard(upper >= 0)
    last = lower is None or guard(lower <= keys - rows)
    return first and last and (lower is None or upper is None or guard(lower <= upper))


def _pse_shift(call: AttentionCall) -> Tensor | None:
    """The bias as (1 or B, Hq, Sq, Skv), in its own dtype: the ops want the query's and refuse another."""
    if call.bias is None:
        return None
    bias = four_dims(call.bias)
    return bias.expand(bias.size(0), call.query.size(1), call.query.size(2), call.key.size(2)).contiguous()


def _dense(call: AttentionCall, keep: Tensor) -> Tensor:
    """What is removed, as (1 or B, 1, Sq, Skv) or (B, Hq, Sq, Skv): the kernels broadcast no more than that."""
    keep = four_dims(keep)
    batch, heads = call.query.size(0), call.query.size(1)
    if guard(keep.size(1) == 1):
        heads = 1
        if not guard(call.query.size(2) == 1):
            batch = keep.size(0)
    return (~keep).expand(batch, heads, call.query.size(2), call.key.size(2)).contiguous()
