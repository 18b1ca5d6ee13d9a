"""One captured graph: its static inputs, its outputs, and what a call of each size copies in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_npu.runtime.capture.buckets import Bucket, Declared, cut, widened
from sgl_npu.runtime.capture.buffers import Buffer, Copies, copies_of
from sgl_npu.runtime.capture.captured_graph import HostList, NotCapturable
from sgl_npu.runtime.capture.driver import Driver
from sgl_npu.runtime.capture.outputs import Outputs
from sgl_npu.runtime.capture.structure import flatten, is_host_list, list_name
from sgl_npu.runtime.merged_weights import JoinedWeight, noting


@dataclass(frozen=True)
class Shaping:
    """What was declared of inputs and outputs. updated: names of host lists, and what operators call them."""

    dims: Declared
    output_dims: Declared
    pad: Declared
    updated: Mapping[str, str]

    def fitted(self, path: str, values: Sequence[int], bucket: Bucket) -> list[int]:
        """A host list as long as in the bucket."""
        (length,) = widened(values, self.dims.of(path), bucket)
        return [*values[:length], *[self.pad.of(path)] * (length - len(values))]


@dataclass(frozen=True)
class Step:
    """A call of one size, ready to run.

    written: inputs that the callable writes to, by index, and where. tails: what each host list lacks. merged: weights
    that were joined outside of the graph.
    """

    graph: BucketGraph
    copies: list[Copies]
    replay: Callable[[], object]
    update: Callable[[list[list[int]]], object] | None
    tails: list[list[int]]
    written: list[tuple[int, Tensor]]
    handed_out: Callable[[], Any]
    merged: list[JoinedWeight]

    def run(self, tensors: list[Tensor], lists: list[list[int]]) -> Any:
        for copies in self.copies:
            copies.run(tensors)
        if self.update is not None:
            self.update([[*values, *tail] for values, tail in zip(lists, self.tails, strict=True)])
        for weight in self.merged:
            weight.refresh()
        self.replay()
        for index, static in self.written:
            tensors[index].copy_(static)
        return self.handed_out()


class BucketGraph:
    """A graph that was captured for a bucket.

    call: runs the user's function on inputs by name. inputs: of any size; with their values the graph is warmed up and
    captured, cut or padded to the bucket. Raises whatever the function, the capture or its outputs raise.
    """

    last_replay = 0  # by the runner's count

    def __init__(
        self,
        call: Callable[[dict[str, Any]], Any],
        inputs: dict[str, Any],
        size: Bucket,
        bucket: Bucket,
        shaping: Shaping,
        driver: Driver,
        warmup: int,
    ) -> None:
        self.bucket, self._shaping = bucket, shaping
        self._buffers: list[Buffer] = []
        self._lists: list[tuple[str, HostList]] = []  # those that are updated, by path
        leaves, unflatten = flatten(inputs)
        values = [self._static(path, leaf) for path, leaf in leaves]
        self._load([leaf for _, leaf in leaves if isinstance(leaf, Tensor)], size)
        versions = [buffer.static._version for buffer in self._buffers]
        values_before = [buffer.raw().clone() for buffer in self._buffers]
        before = driver.pool_bytes()
        with noting() as merged:
            self._graph = driver.capture(lambda: call(unflatten(values)), warmup, [found for _, found in self._lists])
        self._merged = list(dict.fromkeys(merged))
        after = driver.pool_bytes()
        self._grown = 0 if before is None or after is None else max(after - before, 0)
        self._written = [
            at
            for at, buffer in enumerate(self._buffers)
            # A kernel that was launched directly, or a write through .data, changes values and no version.
            if buffer.static._version != versions[at] or not torch.equal(buffer.raw(), values_before[at])
        ]
        try:
            self._outputs = Outputs(self._graph.outputs, shaping.output_dims, bucket)
        except NotCapturable:
            self.free()
            raise

    def _static(self, path: str, leaf: Any) -> Any:
        """What the graph reads instead of an input."""
        shaping = self._shaping
        if isinstance(leaf, Tensor):
            self._buffers.append(Buffer(leaf, shaping.dims.of(path), shaping.pad.of(path), self.bucket))
            return self._buffers[-1].static
        if not is_host_list(leaf):
            return leaf
        values = shaping.fitted(path, leaf, self.bucket)
        key = shaping.updated.get(list_name(path))
        if key is None:
            return type(leaf)(values)
        self._lists.append((path, HostList(key, values)))
        return values

    def _load(self, tensors: list[Tensor], size: Bucket) -> None:
        common = size.common(self.bucket)
        given = [cut(x, buffer.dims, common) for x, buffer in zip(tensors, self._buffers, strict=True)]
        for copies in copies_of(self._buffers, common):
            copies.run(given)

    @property
    def bytes(self) -> int:
        return self._grown + sum(buffer.bytes for buffer in self._buffers)

    def step(self, size: Bucket, copy: bool) -> Step:
        """What a call of that size does; it must fit into the bucket."""
        tails = []
        for path, (_, values) in self._lists:
            (real,) = widened(values, self._shaping.dims.of(path), size)
            tails.append([self._shaping.pad.of(path)] * (len(values) - real))
        return Step(
            graph=self,
            copies=copies_of(self._buffers, size),
            replay=self._graph.replay,
            update=self._graph.update if self._lists else None,
            tails=tails,
            written=[(index, self._buffers[index].part(size)) for index in self._written],
            handed_out=self._outputs.handed_out(size, copy),
            merged=self._merged,
        )

    def free(self) -> None:
        self._graph.free()
