"""The rows that the ranks of one ulysses group hold together, once they have exchanged heads for rows.

before: rank (r, u) has piece u of its blocks and H heads
after:  rank (r, u) has all pieces of its blocks and H / U heads; its rows are a `BlockLayout` over the axis blocks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.runtime.sequence import SequenceLayout, even_share
from sgl_npu.runtime.sizes import Size, known


@dataclass(frozen=True)
class BlockLayout(SequenceLayout):
    """A layout without an ulysses axis in which every chunk is `pieces` chunks of the layout it was made from.

    The pieces are padded on their own, so a chunk may be longer than its share of the sequence.
    """

    pieces: int = 1

    def chunk(self, segment: int = 0) -> Size:
        chunks = self.chunks * self.pieces
        return even_share(self.segments[segment], chunks) * self.pieces

    @property
    def is_even(self) -> bool:
        return all(known(length % (self.chunks * self.pieces) == 0) for length in self.segments)


def block_layout(layout: SequenceLayout) -> BlockLayout:
    return BlockLayout(layout.segments, layout.blocks, 1, layout.zigzag, layout.ulysses)


def block_ranks(ranks: Tensor) -> Tensor:
    """The rank's index in a block layout."""
    return F.pad(ranks[:1], (0, 1))


def _halves(layout: SequenceLayout) -> list[Size]:
    """Rows of every contiguous run of a rank's rows."""
    numbers = range(len(layout.segments))
    return [layout.chunk(number) for number in numbers for _ in range(2 if layout.zigzag else 1)]


def _keeps_order(layout: SequenceLayout) -> bool:
    return layout.ulysses == 1 or len(_halves(layout)) == 1


def to_blocks(x: Tensor, layout: SequenceLayout) -> Tensor:
    """Rows (dimension 2) of the group's ranks, one rank after the other, in the order of the block layout."""
    if _keeps_order(layout):
        return x
    runs = x.unflatten(2, (layout.ulysses, layout.local_length)).split(_halves(layout), 3)
    return torch.cat([run.flatten(2, 3) for run in runs], 2)


def from_blocks(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The inverse of `to_blocks`."""
    if _keeps_order(layout):
        return x
    halves = _halves(layout)
    runs = x.split([layout.ulysses * half for half in halves], 2)
    pieces = [run.unflatten(2, (layout.ulysses, half)) for run, half in zip(runs, halves, strict=True)]
    return torch.cat(pieces, 3).flatten(2, 3)


def without_padding(x: Tensor, layout: BlockLayout) -> Tensor:
    """The rows of the sequence, for a layout of one block, which has them in order but for the padding."""
    if layout.is_even:
        return x
    parts, offset = [], 0
    for segment, length in enumerate(layout.segments):
        parts.append(x.narrow(2, offset, length))
        offset = offset + layout.local(segment)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def with_padding(x: Tensor, layout: BlockLayout) -> Tensor:
    """The inverse of `without_padding`: the last row of a segment is repeated."""
    if layout.is_even:
        return x
    return x.index_select(2, layout.positions(torch.zeros(2, dtype=torch.int64, device=x.device)))
