"""Rows of queries for which nothing is kept: their result is 0 and their lse -inf, whatever a kernel gives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, four_dims
from sgl_npu.runtime.attention import band_mask
from sgl_npu.runtime.sizes import known


def may_have_no_key(call: AttentionCall) -> bool:
    """Whether some row may keep nothing: False where the band alone decides and leaves every row a key."""
    if call.mask is not None or call.bias is not None:
        return True
    lower, upper = call.lower, call.upper
    first_row = upper is None or known(upper >= 0)
    last_row = lower is None or known(lower <= call.key.size(2) - call.query.size(2))
    between = lower is None or upper is None or known(lower <= upper)
    return not (first_row and last_row and between)


def has_no_key(call: AttentionCall) -> Tensor:
    """Bool, broadcastable to (B, Hq, Sq): rows for which band, mask and bias leave no key."""
    keep = call.mask
    if call.bias is not None:
        finite = call.bias != float("-inf")
        keep = finite if keep is None else keep & finite
    if keep is None:
        first, last = _band_ends(call)
        return last <= first
    keep = four_dims(keep)
    if known(keep.size(2) == 1) and (call.lower is not None or call.upper is not None):
        return _has_no_key_in_band(keep.squeeze(2), call)
    band = band_mask(call.query.size(2), call.key.size(2), call.lower, call.upper, call.query.device)
    return ~(keep if band is None else keep & band).any(-1)


def _has_no_key_in_band(keep: Tensor, call: AttentionCall) -> Tensor:
    """The same for keys (B, H, 1 or Skv) that are kept alike for all rows: by how many the band of a row has kept."""
    kept = F.pad(keep.expand(*keep.shape[:-1], call.key.size(2)).cumsum(-1), (1, 0))
    first, last = _band_ends(call)
    return kept.index_select(-1, last) <= kept.index_select(-1, first)


def _band_ends(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The first key that the band leaves to each row, and the one behind the last; int64 (Sq,)."""
    keys = call.key.size(2)
    row = torch.arange(call.query.size(2), device=call.query.device)
    first = torch.zeros_like(row) if call.lower is None else (row + call.lower).clamp(0, keys)
    last = torch.full_like(row, keys) if call.upper is None else (row + call.upper + 1).clamp(0, keys)
    return first, last
