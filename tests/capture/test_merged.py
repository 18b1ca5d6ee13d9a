"""Weights that were joined before a capture are joined again before a replay, where one of them has changed."""

from __future__ import annotations

import gc

import pytest
import torch
from capture.recording_driver import RecordingDriver
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgl_npu import GraphRunner
from sgl_npu.runtime import merged_weights
from sgl_npu.runtime.capture.captured_graph import CapturedGraph
from sgl_npu.runtime.merged_weights import Join, MergedWeight


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outs in self.calls:
                pairs = zip(tree_leaves(outs), tree_leaves(func(*args, **kwargs)), strict=True)
                for static, new in pairs:
                    if static.data_ptr() != new.data_ptr():
                        static.copy_(new)


class OpDriver(RecordingDriver):
    """A replay runs the operators that the captured run has called, as a device does, and none of its Python."""

    def capture(self, run, warmup, lists):
        for _ in range(warmup):
            run()
        with _Recorder() as recorder:
            outputs = run()
        return CapturedGraph(outputs, recorder.replay, lambda: None)


@pytest.fixture
def weights():
    return [torch.nn.Parameter(torch.randn(size, 4)) for size in (3, 2, 2)]


def runner_of(weights):
    merged = MergedWeight(Join((0, 1, 2), (3, 2, 2), 0))
    return GraphRunner(
        lambda x: x @ merged(weights).t(),
        buckets=[2],
        dims={"x": ("batch",)},
        output_dims=("batch",),
        driver=OpDriver(),
    )


def expected(weights, x):
    return x @ torch.cat(list(weights)).t()


def step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5, fused=True).step()


@pytest.mark.parametrize("change", [lambda weight: weight.mul_(3), step], ids=["in place", "a fused optimizer"])
@pytest.mark.parametrize("changed", range(3))
def test_a_replay_reads_what_has_changed(changed, change, weights):
    runner = runner_of(weights)
    with torch.no_grad():
        for x in torch.randn(3, 2, 4):
            torch.testing.assert_close(runner(x=x), expected(weights, x))
            change(weights[changed])
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 3)


def test_a_capture_that_nobody_refreshes_joins_the_weights_in_every_replay(monkeypatch, weights):
    merged = MergedWeight(Join((0, 1, 2), (3, 2, 2), 0))
    x = torch.randn(2, 4)
    with torch.no_grad():
        merged(weights)
        monkeypatch.setattr(merged_weights, "_is_capturing", lambda tensor: True)
        with _Recorder() as recorder:
            out = x @ merged(weights).t()
        weights[1].mul_(3)
        recorder.replay()
        torch.testing.assert_close(out, expected(weights, x))


def test_weights_that_are_gone_stay_as_they_were_in_the_graph(weights):
    runner, x = runner_of(weights), torch.randn(2, 4)
    with torch.no_grad():
        before = runner(x=x)
        weights[0] = torch.nn.Parameter(torch.zeros(3, 4))
        gc.collect()
        torch.testing.assert_close(runner(x=x), before)


def test_weights_of_another_size_leave_a_graph_as_it_was(weights):
    runner, x = runner_of(weights), torch.randn(2, 4)
    with torch.no_grad():
        before = runner(x=x)
        for weight in weights:
            weight.data = torch.zeros(len(weight), 5)
        torch.testing.assert_close(runner(x=x), before)
