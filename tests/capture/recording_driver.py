"""Graphs on the CPU, for tests: a replay runs what was captured once more, on the same memory.

Like a real one a graph keeps its Python values and reads its tensors where they lay; its outputs are in a pool that
others use as well, so every replay spoils theirs; and what is freed must not be read again.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from sgl_npu.runtime.capture.captured_graph import CapturedGraph


class RecordingDriver:
    """update_keys: host lists that replays can change. log: what was asked for, in order."""

    def __init__(self, *update_keys: str, tells_bytes: bool = True) -> None:
        self.device = torch.device("cpu")
        self.update_keys = frozenset(update_keys)
        self.log: list[str] = []
        self.capturing = False
        self._tells_bytes = tells_bytes
        self._graphs: list[_Recording] = []

    def capture(self, run, warmup, lists):
        for _ in range(warmup):
            run()
        self.capturing = True
        try:
            outputs = run()
        finally:
            self.capturing = False
        self.log.append("capture")
        recording = _Recording(self, run, outputs, lists)
        self._graphs.append(recording)
        return CapturedGraph(outputs, recording.replay, recording.free, recording.update if lists else None)

    def pool_bytes(self):
        return sum(graph.bytes for graph in self._graphs) if self._tells_bytes else None


class _Recording:
    def __init__(self, driver, run, outputs, lists) -> None:
        self.driver, self.run, self.lists = driver, run, lists
        self.outputs = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        self.bytes = sum(x.nbytes for x in self.outputs)

    def replay(self) -> None:
        assert self in self.driver._graphs, "a graph was replayed after it was freed"
        for graph in self.driver._graphs:
            if graph is not self:
                graph.spoil()
        found = [x for x in pytree.tree_leaves(self.run()) if isinstance(x, torch.Tensor)]
        with torch.inference_mode():  # a device writes to any tensor
            for static, new in zip(self.outputs, found, strict=True):
                static.copy_(new)
        self.driver.log.append("replay")

    def update(self, values) -> None:
        for host_list, new in zip(self.lists, values, strict=True):
            assert len(new) == len(host_list.values)
            host_list.values[:] = new
        self.driver.log.append("update")

    def free(self) -> None:
        self.driver._graphs.remove(self)
        self.spoil()
        self.driver.log.append("free")

    def spoil(self) -> None:
        with torch.inference_mode():
            for x in self.outputs:
                x.fill_(torch.nan if x.is_floating_point() else 77)
