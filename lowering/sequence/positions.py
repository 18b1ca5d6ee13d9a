"""A call on some rows and some columns of the global scores: its band, mask and bias at their positions.

Right for every mask and every layout, at the price of a mask tensor: schemes use it where nothing cheaper is right.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, four_dims
from sgl_npu.runtime.sequence import SequenceLayout
from sgl_npu.runtime.sizes import guard, known, same_sizes


def rows_of(x: Tensor | None, positions: Tensor | None, dim: int) -> Tensor | None:
    """`x`, which broadcasts to (B, Hq, Sq, Skv), at some positions of a dimension; None for all of them."""
    if x is None or positions is None:
        return x
    x = four_dims(x)
    return x if guard(x.size(dim) == 1) else x.index_select(dim, positions)


def at_positions(
    call: AttentionCall,
    rows: Tensor | None,
    columns: Tensor | None = None,
    padding: Tensor | None = None,
) -> AttentionCall:
    """The call with the mask and bias of those rows and columns, and the band in its mask.

    `rows` and `columns` are positions in the sequences, None for all; `padding` (Skv,) is True for keys to leave out.
    """
    mask = rows_of(rows_of(call.mask, rows, 2), columns, 3)
    bias = rows_of(rows_of(call.bias, rows, 2), columns, 3)
    for keep in (_band(call, rows, columns), None if padding is None else ~padding):
        if keep is not None:
            mask = keep[(None,) * (4 - keep.dim())] if mask is None else mask & keep
    return replace(call, mask=mask, bias=bias).with_band(None, None)


def _band(call: AttentionCall, rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
    if call.lower is None and call.upper is None:
        return None
    device = call.query.device
    rows = torch.arange(call.query.size(2), device=device) if rows is None else rows
    columns = torch.arange(call.key.size(2), device=device) if columns is None else columns
    distance = columns.unsqueeze(0) - rows.unsqueeze(1)
    below = None if call.upper is None else distance <= call.upper
    above = None if call.lower is None else distance >= call.lower
    if below is None or above is None:
        return above if below is None else below
    return above & below


def padding_of(layout: SequenceLayout, ranks: Tensor) -> Tensor | None:
    """Bool (local_length,): the rows of a rank that are padding; None if no rank has any."""
    return None if layout.is_even else layout.raw_positions(ranks) >= layout.ends(ranks.device)


def global_band(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout) -> AttentionCall:
    """The call without the sides of its band that exclude nothing in sequences of those lengths."""
    lower, upper = call.lower, call.upper
    if upper is not None and known(upper >= kv_layout.length - 1):
        upper = None
    if lower is not None and known(lower <= 1 - layout.length):
        lower = None
    return call.with_band(lower, upper)


def has_no_tensors(call: AttentionCall) -> bool:
    return call.mask is None and call.bias is None


def same_rows(one: SequenceLayout, other: SequenceLayout) -> bool:
    """Whether two sequences lie on the ranks in the same way."""
    return one.zigzag == other.zigzag and same_sizes(one.segments, other.segments)


def is_causal(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout) -> bool:
    """Every position of one sequence sees itself and what is before it, and no tensor says otherwise."""
    diagonal = call.upper is not None and known(call.upper == 0)
    return call.lower is None and diagonal and has_no_tensors(call) and same_rows(layout, kv_layout)
