"""What a runner needs of a device: graphs that are captured, replayed, updated and freed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch

from sgl_npu.runtime.capture.captured_graph import CapturedGraph, HostList
from sgl_npu.runtime.capture.cuda import CudaDriver
from sgl_npu.runtime.capture.npu import NpuDriver


class Driver(Protocol):
    """Graphs of one device.

    update_keys: arguments of operators that are lists of ints on the host and of which a captured graph takes new
    values; empty where a graph keeps the values that it was captured with.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def update_keys(self) -> Collection[str]: ...

    def capture(self, run: Callable[[], Any], warmup: int, lists: Sequence[HostList]) -> CapturedGraph:
        """Run `warmup` times on a side stream, then capture one more run.

        lists: those among the inputs of `run` whose values replays bring up to date.
        """

    def pool_bytes(self) -> int | None:
        """What the memory pool of all its graphs has reserved; None where the device does not tell."""


# By the type of a device. Others have no graphs.
DRIVERS: dict[str, Callable[[torch.device], Driver]] = {"cuda": CudaDriver, "npu": NpuDriver}
