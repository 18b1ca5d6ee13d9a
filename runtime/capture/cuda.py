"""Graphs of CUDA and HIP devices. A host list is part of what was captured: nothing can change it in a replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from sgl_npu.runtime.capture.captured_graph import CapturedGraph, HostList
from sgl_npu.runtime.capture.side_stream import SideStream


class CudaDriver:
    update_keys: frozenset[str] = frozenset()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = SideStream(torch.cuda, device)

    def capture(self, run: Callable[[], Any], warmup: int, lists: Sequence[HostList]) -> CapturedGraph:
        graph = torch.cuda.CUDAGraph()
        with self._random_numbers_after_a_failure():
            outputs = self._side.capture(run, warmup, graph, partial(torch.cuda.graph, graph))
        return CapturedGraph(outputs, graph.replay, partial(self._side.free, graph))

    @contextlib.contextmanager
    def _random_numbers_after_a_failure(self) -> Iterator[None]:
        """A capture that fails leaves the device's generator recording: every later random op raises (torch 2.11)."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        generator = torch.cuda.default_generators[index]
        state = generator.clone_state()
        try:
            yield
        except BaseException:
            generator.graphsafe_set_state(state)
            raise

    def pool_bytes(self) -> int:
        return self._side.pool_bytes()
