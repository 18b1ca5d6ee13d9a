"""What torch.npu and torch.cuda have in common for graphs, and updates as graphs.py of torch_npu 2.13 has them.

Nothing is computed but `attention`, an operator that adds lengths to rows and that is recorded for updates.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

FIA = "npu_fused_infer_attention_score.out"
SPECS = {FIA: [("arg", 1, "actual_seq_lengths"), ("arg", 2, "actual_seq_lengths_kv")]}


class Handler:
    UPDATE_SPECS = SPECS

    @staticmethod
    def get_update_specs(name):
        return SPECS.get(name, [])


class Generator:
    """Of random numbers on the device. What a failed capture leaves in its state is "recording"."""

    state = "fresh"

    def clone_state(self):
        clone = Generator()
        clone.state = self.state
        return clone

    def graphsafe_set_state(self, other):
        self.state = other.state


class Device:
    """log: what happened. broken: the end of a capture fails, and leaves its stream behind."""

    def __init__(self) -> None:
        self.default_generators = [Generator()]
        self.log: list[str] = []
        self.recording = None
        self.broken = False
        self.pools = 0
        self.stream_now = "default"
        self.streams: list[SimpleNamespace] = []

    device = staticmethod(lambda device: contextlib.nullcontext())
    synchronize = staticmethod(lambda: None)
    memory_snapshot = staticmethod(
        lambda: [{"segment_pool_id": (0, 0), "total_size": 5}, {"segment_pool_id": (0, 1), "total_size": 64}]
    )

    def current_device(self):
        return 0

    def Stream(self):
        self.streams.append(SimpleNamespace(wait_stream=lambda other: self.log.append("wait")))
        return self.streams[-1]

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("waited for"))

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    def Event(self):
        return SimpleNamespace(
            record=lambda: self.log.append("record"), synchronize=lambda: self.log.append("synchronize")
        )

    def NPUGraph(self):
        return Graph(self)

    CUDAGraph = NPUGraph

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, auto_dispatch_capture=False):
        self.log.append(f"capture in {pool}")
        self.recording = graph if auto_dispatch_capture else None
        outside, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.recording = None
            if self.broken:
                raise RuntimeError("the capture was invalid")
            self.stream_now = outside

    def run_on(self, fn):
        """`fn`, which says on which stream it runs."""

        def run(x):
            self.log.append(f"run on {self.streams.index(self.stream_now)}")
            return fn(x)

        return run

    def attention(self, x, lengths_kv, lengths=None):
        out = x.clone() if lengths_kv is None else x + torch.tensor(lengths_kv)[:, None]
        if self.recording is not None:
            name = SimpleNamespace(__name__=FIA)
            record = SimpleNamespace(
                args=[x, lengths, lengths_kv], kwargs={}, op_cache_entry=name, ready=False, out=out
            )
            self.recording.graph_dispatch_mode.graph_dispatch_records.append(record)
        return out


class Graph:
    def __init__(self, device) -> None:
        self.device = device
        self.graph_dispatch_mode = SimpleNamespace(graph_dispatch_records=[])

    def replay(self):
        for record in self.graph_dispatch_mode.graph_dispatch_records:
            assert record.ready, "the device would wait for ever"
            record.ready = False
            x, _, lengths = record.args
            record.out.copy_(x if lengths is None else x + torch.tensor(lengths)[:, None])
        self.device.log.append("replay")

    def update(self, cpu_update_input):
        records = self.graph_dispatch_mode.graph_dispatch_records
        assert len(cpu_update_input) == len(records)
        for record, values in zip(records, cpu_update_input, strict=True):
            for _, where, key in SPECS[FIA]:
                if key in values:
                    record.args[where] = values[key]
            record.ready = True
        self.device.log.append("update")

    def reset(self):
        self.device.log.append("reset")
