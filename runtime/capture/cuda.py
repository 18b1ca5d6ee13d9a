"""Graphs of CUDA and HIP devices. A host list is part of what was captured: nothing can change it in a replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        outputs = self._side.capture(run, warmup, partial(torch.cuda.graph, graph))
        return CapturedGraph(outputs, graph.replay, partial(self._side.free, graph))

    def pool_bytes(self) -> int:
        return self._side.pool_bytes()
