"""Where the graphs of a device are warmed up and captured: one stream of their own and one pool of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SideStream:
    """api: torch.cuda, or torch.npu, whose streams, graphs and pools have the same names."""

    def __init__(self, api: Any, device: torch.device) -> None:
        self._api, self._device = api, device
        self._stream: Any = None
        self._pool: Any = None
        self._pools: set[tuple[int, int]] = set()
        self._graphs = 0  # alive in the pool

    def capture(self, run: Callable[[], Any], warmup: int, recording: Callable[..., Any]) -> Any:
        """What `run` returns when it is captured. recording: the context that captures, given a pool and a stream.

        Warming up on the stream that captures is what torch's notes on CUDA graphs ask for; cuBLAS and hipBLASLt make
        their handles per stream.
        """
        api = self._api
        with api.device(self._device):
            self._stream = self._stream or api.Stream()
            if self._pool is None:
                self._pool = api.graph_pool_handle()
                self._pools.add(tuple(self._pool))
            self._stream.wait_stream(api.current_stream())
            failure: BaseException | None = None
            try:
                # torch.cuda.graph leaves its stream current when the end of a capture fails; this context does not.
                with api.stream(self._stream):
                    for _ in range(warmup):
                        run()
                    with recording(pool=self._pool, stream=self._stream):
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
            api.current_stream().wait_stream(self._stream)
        self._graphs += 1
        return outputs

    def free(self, graph: Any) -> None:
        """Give a graph's memory back to the pool, once the device has finished with it."""
        with self._api.device(self._device):
            self._api.synchronize()
            graph.reset()
        self._graphs -= 1
        if self._graphs == 0:
            self._pool = None  # the allocator refuses to use a pool again whose last graph is gone

    def pool_bytes(self) -> int:
        """What the allocator has reserved for these graphs."""
        segments = self._api.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) in self._pools)
