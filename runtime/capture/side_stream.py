"""Where the graphs of a device are warmed up and captured: two streams of their own and one pool of memory.

What is allocated for a stream once, such as cuBLAS's workspace, has to lie in the pool of the graphs: resetting one of
them gives the workspace of its stream back (torch 2.13), and outside of the pool that memory could become another
tensor's while other graphs still write to it. So nothing runs on the stream that captures but captures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SideStream:
    """api: torch.cuda, or torch.npu, whose streams, graphs and pools have the same names."""

    def __init__(self, api: Any, device: torch.device) -> None:
        self._api, self._device = api, device
        self._warming: Any = None
        self._capturing: Any = None
        self._pool: Any = None
        self._pools: set[tuple[int, int]] = set()  # all that had graphs: the allocator may keep some of their memory
        self._pool_of: dict[Any, Any] = {}  # of the graphs that are alive

    def capture(self, run: Callable[[], Any], warmup: int, graph: Any, recording: Callable[..., Any]) -> Any:
        """What `run` returns when it is captured. recording: the context that captures, given a pool and a stream."""
        api = self._api
        with api.device(self._device):
            self._warming, self._capturing = self._warming or api.Stream(), self._capturing or api.Stream()
            pool = self._pool = self._pool or api.graph_pool_handle()
            self._warming.wait_stream(api.current_stream())
            with api.stream(self._warming):
                for _ in range(warmup):
                    run()
            self._capturing.wait_stream(self._warming)
            failure: BaseException | None = None
            try:
                # torch.cuda.graph leaves its stream current when the end of a capture fails; this context does not.
                with api.stream(self._capturing), recording(pool=pool, stream=self._capturing):
                    try:
                        outputs = run()
                    except BaseException as error:
                        failure = error
                        raise
            except BaseException as error:
                self._pool = None  # the allocator may still count it as recording
                if failure is None or failure is error:
                    raise
                raise failure from None  # the end of a capture that failed raises another error over it
            api.current_stream().wait_stream(self._capturing)
        self._pools.add(tuple(pool))
        self._pool_of[graph] = pool
        return outputs

    def free(self, graph: Any) -> None:
        """Give a graph's memory back to its pool, once the device has finished with it."""
        with self._api.device(self._device):
            self._api.synchronize()
            graph.reset()
        del self._pool_of[graph]
        if self._pool not in self._pool_of.values():
            self._pool = None  # the allocator refuses to use a pool again whose last graph is gone

    def pool_bytes(self) -> int:
        """What the allocator has reserved for these graphs."""
        segments = self._api.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) in self._pools)
