"""How one sequence lies on the ranks that share it.

The ranks form a grid of `blocks` x `ulysses`, in which the ulysses index runs fastest. The outer axis is that of the
ring or of the KV-gather. A sequence is a row of segments, each spread over all ranks on its own: text and image tokens
that a model concatenates stay apart on every rank. Every rank has the same number of rows, so every rank has the same
graph; rows past the end of a segment repeat its last one and are called padding.

    contiguous  rank p of P has rows [p h, (p+1) h)                              h = ceil(S / P)
    zigzag      rank (r, u) of R x U has piece u of blocks r and 2R-1-r, in that order; a block is U h rows
                                                                                 h = ceil(S / 2P)

Zigzag (also called head-tail) gives every rank the same share of a causal triangle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_npu.runtime.sizes import Size, known


def even_share(length: Size, parts: int) -> Size:
    """ceil(length / parts), and no rounding in the formula where none is needed."""
    return length // parts if known(length % parts == 0) else (length + parts - 1) // parts


@dataclass(frozen=True)
class Axis:
    """Ranks that exchange something: how many, and the name of their process group."""

    size: int
    group: str


@dataclass(frozen=True)
class SequenceMesh:
    """The ranks that share one sequence. `whole` are all of them, in the order blocks-major."""

    blocks: Axis
    ulysses: Axis
    whole: Axis

    @property
    def size(self) -> int:
        return self.whole.size


@dataclass(frozen=True)
class SequenceLayout:
    """The rows of one sequence on each rank of a grid of `blocks` x `ulysses`.

    `segments`: the lengths that add up to the sequence's. `zigzag` needs exactly one segment.
    """

    segments: tuple[Size, ...]
    blocks: int
    ulysses: int
    zigzag: bool = False

    def __post_init__(self) -> None:
        assert not self.zigzag or len(self.segments) == 1

    @property
    def length(self) -> Size:
        """S, of the whole sequence."""
        return sum(self.segments[1:], start=self.segments[0])

    @property
    def chunks(self) -> int:
        """How many equal chunks a segment is cut into."""
        return self.blocks * self.ulysses * (2 if self.zigzag else 1)

    def chunk(self, segment: int = 0) -> Size:
        """h: the rows of one chunk of a segment."""
        return even_share(self.segments[segment], self.chunks)

    def local(self, segment: int) -> Size:
        """Rows of a segment on one rank."""
        return self.chunk(segment) * (2 if self.zigzag else 1)

    @property
    def local_length(self) -> Size:
        """Rows of the sequence on one rank."""
        sizes = [self.local(segment) for segment in range(len(self.segments))]
        return sum(sizes[1:], start=sizes[0])

    @property
    def is_even(self) -> bool:
        """Whether no rank is known to have padding, for every size the graph may meet."""
        return all(known(length % self.chunks == 0) for length in self.segments)

    def starts(self, ranks: Tensor, segment: int = 0) -> Iterator[Tensor]:
        """Where each chunk that a rank has of a segment starts in it, int64 (1,); `ranks` as for `raw_positions`."""
        block, piece = ranks[:1], ranks[1:2]  # (1,): a scalar and a chunk of one row are one shape to npugraph_ex
        numbers = (block, 2 * self.blocks - 1 - block) if self.zigzag else (block,)
        for number in numbers:
            yield (number * self.ulysses + piece) * self.chunk(segment)

    def raw_positions(self, ranks: Tensor) -> Tensor:
        """Int64 (local_length,): the position in the sequence of every local row.

        `ranks` is int64 (2,): the rank's index on the axes blocks and ulysses. In a segment's padding the positions
        run on past the end of the segment: compare with `ends`.
        """
        parts, before = [], 0
        for segment, length in enumerate(self.segments):
            rows = torch.arange(self.chunk(segment), device=ranks.device)
            parts += [start + rows + before for start in self.starts(ranks, segment)]
            before = before + length
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def ends(self, device: torch.device) -> Tensor:
        """Int64 (local_length,): where the segment of every local row ends. A row is padding from there on."""
        parts, end = [], 0
        for segment, length in enumerate(self.segments):
            end = end + length
            parts.append(torch.full((self.local(segment),), end, dtype=torch.int64, device=device))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def positions(self, ranks: Tensor) -> Tensor:
        """Int64 (local_length,): the row of the sequence that every local row holds; padding repeats the last one."""
        raw = self.raw_positions(ranks)
        return raw if self.is_even else torch.minimum(raw, self.ends(ranks.device) - 1).clamp(min=0)

    def gathered_index(self, device: torch.device) -> Tensor:
        """Int64 (length,): where each row of the sequence is in the rank-major concatenation of all local rows."""
        parts, offset = [], 0
        for segment, length in enumerate(self.segments):
            row = torch.arange(length, device=device)
            chunk, within = row // self.chunk(segment), row % self.chunk(segment)
            block, piece = chunk // self.ulysses, chunk % self.ulysses
            if self.zigzag:
                tail = block >= self.blocks
                block = torch.where(tail, 2 * self.blocks - 1 - block, block)
                within = within + tail * self.chunk(segment)
            parts.append((block * self.ulysses + piece) * self.local_length + offset + within)
            offset = offset + self.local(segment)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def is_rank_major(self) -> bool:
        """Whether the local rows, one rank after the other, are the sequence: no zigzag, one segment, no padding."""
        return not self.zigzag and len(self.segments) == 1 and self.is_even
