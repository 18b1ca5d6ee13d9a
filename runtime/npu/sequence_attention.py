"""Attention over one sequence in float32, and the positions which the sparse modes remove."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from sgl_npu.runtime.npu.fia_mask_rules import COMPRESSED_SIDE

NO_LIMIT = 2**62


class Softmax(NamedTuple):
    """out (N, S1, Dv), and the maximum and sum of the softmax (N, S1, 1); all float32.

    A row without any score left has out 0, maximum -inf and sum 0.
    """

    out: torch.Tensor
    maximum: torch.Tensor
    total: torch.Tensor


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    removed: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
) -> Softmax:
    """Attention of query (N, S1, D) to key (Nk, S2, D) and value (Nk, S2, Dv), query heads in groups of N/Nk.

    `bias` (N, S1, S2) is added to the scaled scores, keys in `removed` (broadcasting to it) do not take part,
    and `sink` (N,) holds one more score per head, which takes its share of the softmax but has no value.
    Maximum and sum count the sink.
    """
    heads, rows, dim = query.shape
    kv_heads, keys, value_dim = value.shape
    # The heads of a group read the same keys, so they become rows of one product and no key is repeated.
    grouped = query.float().reshape(kv_heads, heads // kv_heads * rows, dim)
    scores = (grouped @ key.float().transpose(1, 2)).view(heads, rows, keys) * scale
    if bias is not None:
        scores = scores + bias.float()
    if removed is not None:
        scores = scores.masked_fill(removed, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.float().view(heads, 1, 1).expand(heads, rows, 1)], dim=-1)
    empty_row = scores.new_full((heads, rows, 1), -torch.inf)
    maximum = scores.amax(-1, keepdim=True) if scores.shape[-1] else empty_row
    blank = maximum == -torch.inf
    weights = torch.exp(scores - maximum.masked_fill(blank, 0.0))
    total = weights.sum(-1, keepdim=True)
    spread = weights[..., :keys].reshape(kv_heads, heads // kv_heads * rows, keys)
    out = (spread @ value.float()).view(heads, rows, value_dim)
    return Softmax(out / total.masked_fill(blank, 1.0), maximum, total)


def outside_band(
    sparse_mode: int, rows: int, keys: int, before: int, after: int, device: torch.device
) -> torch.Tensor | None:
    """(rows, keys) bool, True where the sparse mode removes key j of row i; None if it removes nothing.

    Mode 0 counts its window from the top left corner, mode 4 from the bottom right one. Mode 2 is causal from
    the top left, mode 3 from the bottom right. Mode 1 knows no window.
    """
    shift = keys - rows
    low, high = {
        0: (-before, after),
        1: (-NO_LIMIT, NO_LIMIT),
        2: (-NO_LIMIT, 0),
        3: (-NO_LIMIT, shift),
        4: (shift - before, shift + after),
    }[sparse_mode]
    if low <= 1 - rows and high >= keys - 1:
        return None
    offset = torch.arange(keys, device=device) - torch.arange(rows, device=device)[:, None]
    return (offset < low) | (offset > high)


# The version of every 2048 x 2048 mask that was found right, so that a mask is read once and not per layer.
_checked_masks = WeakIdKeyDictionary()


@functools.cache
def _compressed_pattern(device: torch.device) -> torch.Tensor:
    return torch.ones(COMPRESSED_SIDE, COMPRESSED_SIDE, dtype=torch.bool, device=device).triu(1)


def require_compressed_pattern(op: str, mask: torch.Tensor) -> None:
    """Raises RuntimeError unless the mask of modes 2, 3 and 4 is True exactly above the diagonal.

    The hardware does not look and gives wrong numbers.
    """
    version = None if mask.is_inference() else mask._version
    if version is not None and _checked_masks.get(mask) == version:
        return
    if not torch.equal(mask.bool().view(COMPRESSED_SIDE, -1), _compressed_pattern(mask.device)):
        raise RuntimeError(f"{op}: atten_mask must be ones(2048, 2048).triu(1) for sparse_mode 2, 3 and 4")
    if version is not None:
        _checked_masks[mask] = version
