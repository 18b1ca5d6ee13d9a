"""The numbers of the fused infer attention operator, sequence by sequence, in float32.

Scores are `scale * Q K^T (+ pse_shift)`, keys removed by mask and sparse mode take no part, and the
log-sum-exp is the natural logarithm of the sum of their exponentials.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from sgl_npu.runtime.npu.fia_call import FiaCall
from sgl_npu.runtime.npu.layouts import AxisSizes, build_shape, out_axes, view_bnsd
from sgl_npu.runtime.npu.sequence_attention import attend, outside_band

# The bit of inner_precise that gives rows without any key left the output 0.
ROW_FIX = 2


class FiaTensors(NamedTuple):
    """The tensors of one call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    atten_mask: torch.Tensor | None = None
    pse_shift: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    learnable_sink: torch.Tensor | None = None


class _Span(NamedTuple):
    """Where one sequence lies: its number, batch entry, query rows, and keys (from 0 if they are paged)."""

    number: int
    batch: int
    rows: slice
    keys: slice

    @property
    def row_count(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def key_count(self) -> int:
        return self.keys.stop - self.keys.start


def compute(call: FiaCall, tensors: FiaTensors, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp (float32, empty unless asked for) of a call that obeys the rules.

    Rows beyond their sequence and rows without any key left give 0 and +inf. Where the hardware leaves such a
    row undefined (blanked by a dense mask, inner_precise without the row fix) both are NaN, so that a program
    which reads them shows it.
    """
    query = tensors.query
    q = view_bnsd(query, call.axes, call.num_heads)
    sizes = AxisSizes(q.shape[0], q.shape[1], q.shape[2], call.v.dim)
    out = query.new_zeros(build_shape(out_axes(call.layout), sizes))
    out_view = view_bnsd(out, out_axes(call.layout), call.num_heads)
    lse_axes = "TND" if call.packed else "BNSD"
    lse = query.new_full(build_shape(lse_axes, sizes._replace(dim=1)), torch.inf, dtype=torch.float32)
    lse_view = view_bnsd(lse, lse_axes, call.num_heads)

    dense = _dense_mask(call, tensors.atten_mask)
    undefined = dense is not None and not call.inner_precise & ROW_FIX
    for span in _spans(call):
        if not span.row_count or not span.key_count:
            continue
        result = attend(
            q[span.batch, :, span.rows],
            _keys(call, tensors.key, tensors.block_table, span),
            _keys(call, tensors.value, tensors.block_table, span),
            scale=scale,
            bias=_crop(tensors.pse_shift, span),
            removed=_removed(call, dense, span, query.device),
            sink=tensors.learnable_sink,
        )
        blank = result.total == 0
        rows = result.out.masked_fill(blank, torch.nan if undefined else 0.0)
        out_view[span.batch, :, span.rows] = rows.to(out.dtype)
        log_sum_exp = result.maximum + result.total.log()
        lse_view[span.batch, :, span.rows] = log_sum_exp.masked_fill(blank, torch.nan if undefined else torch.inf)
    return out, lse if call.softmax_lse_flag else lse.new_empty(0)


def _spans(call: FiaCall) -> Iterator[_Span]:
    if call.packed:
        ends, given = call.actual_seq_lengths or (), call.actual_seq_lengths_kv or ()
        keys = [(0, count) for count in given] if call.paged else pairwise((0, *given))
        for number, (row_ends, key_ends) in enumerate(zip(pairwise((0, *ends)), keys, strict=True)):
            yield _Span(number, 0, slice(*row_ends), slice(*key_ends))
        return
    for batch in range(call.q.batch):
        rows, count = call.lengths[batch if len(call.lengths) > 1 else 0]
        yield _Span(batch, batch, slice(0, rows), slice(0, count))


def _keys(call: FiaCall, tensor: torch.Tensor, table: torch.Tensor | None, span: _Span) -> torch.Tensor:
    """Keys or values of a sequence as (Nk, S2, D), read through the block table if there is one."""
    if table is None:
        return view_bnsd(tensor, call.axes, call.kv_heads)[span.batch, :, span.keys]
    blocks = -(-span.key_count // call.block_size)
    pages = tensor[table[span.number, :blocks].long()]
    if pages.dim() == 3:
        pages = pages.unflatten(2, (call.kv_heads, pages.shape[2] // call.kv_heads)).transpose(1, 2)
    return pages.transpose(0, 1).flatten(1, 2)[:, : span.key_count]


def _dense_mask(call: FiaCall, mask: torch.Tensor | None) -> torch.Tensor | None:
    """A dense mask as bool (1 or B, 1, rows, keys); None if the mode takes none."""
    if mask is None or call.sparse_mode not in (0, 1):
        return None
    if mask.dim() == 2:
        # With one query row two axes mean (B, keys), otherwise (rows, keys).
        mask = mask[:, None] if call.decode else mask[None]
    return (mask if mask.dim() == 4 else mask[:, None]).bool()


def _crop(tensor: torch.Tensor | None, span: _Span) -> torch.Tensor | None:
    """The part of a (1 or B, heads, rows, keys) tensor that belongs to a sequence."""
    if tensor is None:
        return None
    return tensor[span.batch if tensor.shape[0] > 1 else 0, :, : span.row_count, : span.key_count]


def _removed(call: FiaCall, dense: torch.Tensor | None, span: _Span, device: torch.device) -> torch.Tensor | None:
    masked = _crop(dense, span)
    # With one query row the sparse mode and its window have no effect, and without a mask there is no window.
    if call.decode or call.atten_mask is None:
        return masked
    band = outside_band(call.sparse_mode, span.row_count, span.key_count, call.pre_tokens, call.next_tokens, device)
    return band if masked is None else masked if band is None else masked | band
