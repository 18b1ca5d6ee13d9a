"""Which dimension of a tensor is spread over the ranks, and how a view moves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sgl_npu.runtime.sequence import SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import Size, known, same_sizes


@dataclass(frozen=True)
class Sharding:
    """Dimension `dim` has outer * S * inner indices; a rank has those of its own rows of the sequence S.

    `outer` and `inner` are 1 unless a view has merged the sequence with its neighbours, as in (B * S, C).
    """

    dim: int
    layout: SequenceLayout
    outer: Size = 1
    inner: Size = 1

    @property
    def is_plain(self) -> bool:
        """Whether the dimension is the sequence and nothing else."""
        return known(self.outer == 1) and known(self.inner == 1)

    @property
    def size(self) -> Size:
        return self.outer * self.layout.length * self.inner

    @property
    def local_size(self) -> Size:
        return self.outer * self.layout.local_length * self.inner

    def at(self, dim: int) -> Sharding:
        return replace(self, dim=dim)

    def local_shape(self, shape: Sequence[Size]) -> list[Size]:
        return [self.local_size if dim == self.dim else size for dim, size in enumerate(shape)]


def same(one: Sharding | None, other: Sharding | None) -> bool:
    """Whether two tensors of one shape lie on the ranks in the same way."""
    if one is None or other is None:
        return one is other
    factors = known(one.outer == other.outer) and known(one.inner == other.inner)
    return one.dim == other.dim and one.layout is other.layout and factors


def through_view(before: Sequence[Size], after: Sequence[Size], sharding: Sharding) -> Sharding | None:
    """The sharding of a tensor of shape `before` once it is viewed as `after`; None where that splits the sequence."""
    ahead = math.prod(before[: sharding.dim]) * sharding.outer
    behind = math.prod(before[sharding.dim + 1 :]) * sharding.inner
    for dim, size in enumerate(after):
        head, tail = math.prod(after[:dim]), math.prod(after[dim + 1 :])
        if any(known(x == 0) for x in (head, tail)):
            return None
        outer, inner = ahead // head, behind // tail
        if not (known(head * outer == ahead) and known(tail * inner == behind)):
            continue
        found = Sharding(dim, sharding.layout, outer, inner)
        if known(found.size == size):
            return found
    return None


@dataclass
class Layouts:
    """The layout of every length that is spread over the ranks: one object per length, so `is` compares them."""

    mesh: SequenceMesh
    made: list[SequenceLayout] = field(default_factory=list)

    def add(self, segments: Sequence[Size], zigzag: bool = False) -> SequenceLayout:
        """The layout of these segments, made if it is new."""
        found = self.of(segments)
        if found is None:
            found = SequenceLayout(tuple(segments), self.mesh.blocks.size, self.mesh.ulysses.size, zigzag)
            self.made.append(found)
        return found

    def of(self, segments: Sequence[Size]) -> SequenceLayout | None:
        """The layout of exactly these segments."""
        return next((layout for layout in self.made if same_sizes(layout.segments, segments)), None)

    def of_length(self, length: Size) -> SequenceLayout | None:
        """The layout of a sequence of this length: the one of most segments, which is what a model has joined."""
        found = [layout for layout in self.made if known(layout.length == length)]
        return max(found, key=lambda layout: len(layout.segments), default=None)
