"""Static inputs of a graph: what a call brings is copied into them, and the rest of them is padding again each time.

before: bucket 4, call of 3    [ a b c ? ]      ? is left from an earlier, larger call
after:                         [ a b c pad ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_npu.runtime.capture.buckets import Bucket, Dims, cut, widened
from sgl_npu.runtime.capture.signature import memory_order


class Buffer:
    """The memory that a graph reads instead of an input.

    like: an input of any size, whose dtype, device and order in memory it has. pad: what is written where a call brings
    nothing.
    """

    def __init__(self, like: Tensor, dims: Dims, pad: Any, bucket: Bucket) -> None:
        self.dims, self.pad, self.bucket = dims, pad, bucket
        shape = widened(like, dims, bucket)
        order = memory_order(like) or tuple(range(len(shape)))
        # Made in inference mode it could not be written to outside of it.
        with torch.inference_mode(False):
            full = torch.full([shape[axis] for axis in order], pad, dtype=like.dtype, device=like.device)
            self.static = full.permute([order.index(axis) for axis in range(len(shape))])
        self._padding: Tensor | None = None

    @property
    def bytes(self) -> int:
        padding = 0 if self._padding is None else self._padding.nbytes
        return self.static.nbytes + padding

    def raw(self) -> Tensor:
        """Its memory as bytes, which can be compared whatever the dtype."""
        return torch.empty(0, dtype=torch.uint8, device=self.static.device).set_(self.static.untyped_storage())

    def part(self, size: Bucket) -> Tensor:
        """Where an input of that size goes."""
        return cut(self.static, self.dims, size)

    def rest(self, size: Bucket) -> list[tuple[Tensor, Tensor]]:
        """What is left of it, in disjoint parts, each with as much padding to copy there."""
        if all(name is None or getattr(size, name) == getattr(self.bucket, name) for name in self.dims):
            return []
        if self._padding is None:
            with torch.inference_mode(False):
                self._padding = torch.full_like(self.static, self.pad)
        parts = []
        views = [self.static, self._padding]
        for axis, name in enumerate(self.dims):
            real, whole = (self.static.shape[axis] if name is None else getattr(x, name) for x in (size, self.bucket))
            if real < whole:
                static, padding = (view.narrow(axis, real, whole - real) for view in views)
                parts.append((static, padding))
                views = [view.narrow(axis, 0, real) for view in views]
        return parts


# CUDA's kernel of `_foreach_copy_` is not written for these (ForeachBinaryOpList.cu of torch 2.13).
ONE_BY_ONE = {torch.uint16, torch.uint32, torch.uint64, torch.float8_e8m0fnu}


@dataclass(frozen=True)
class Copies:
    """One call of `_foreach_copy_`, of tensors of one dtype: on a GPU one kernel where their strides agree."""

    into: list[Tensor]
    picks: list[int] | None  # None: all inputs of the call
    padding: list[Tensor]
    one_by_one: bool

    def run(self, tensors: list[Tensor]) -> None:
        given = tensors if self.picks is None else [tensors[index] for index in self.picks]
        given = [*given, *self.padding] if self.padding else given
        if self.one_by_one:
            for into, x in zip(self.into, given, strict=True):
                into.copy_(x)
        else:
            torch._foreach_copy_(self.into, given)


def copies_of(buffers: Sequence[Buffer], size: Bucket) -> list[Copies]:
    """What brings the inputs of a call of that size into their buffers, and padding around them."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, buffer in enumerate(buffers):
        by_dtype.setdefault(buffer.static.dtype, []).append(index)
    found = []
    for dtype, picks in by_dtype.items():
        rest = [pair for index in picks for pair in buffers[index].rest(size)]
        into = [buffers[index].part(size) for index in picks] + [static for static, _ in rest]
        chosen = picks if len(by_dtype) > 1 else None
        found.append(Copies(into, chosen, [padding for _, padding in rest], dtype in ONE_BY_ONE))
    return found
