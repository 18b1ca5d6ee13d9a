"""The drivers of CUDA and of NPUs on a stand-in of their device: streams, pools, and updates of host lists."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from capture.stand_in_device import FIA, Device, Handler

from sgl_npu import CaptureError, GraphRunner
from sgl_npu.runtime.capture import cuda
from sgl_npu.runtime.capture.npu import NpuDriver

CPU = torch.device("cpu")


@pytest.fixture
def npu(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch, "npu", device, raising=False)
    name = "torch_npu.npu._npugraph_handlers.npugraph_handler"
    for index in range(4):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[: index + 1]), ModuleType("stand-in"))
    monkeypatch.setattr(sys.modules[name], "_NPU_GRAPH_OP_HANDLERS", {FIA: Handler}, raising=False)
    return device


def runner_of(fn, driver=None, **settings):
    defaults = {
        "buckets": [4],
        "dims": {"x": ("batch",), "actual_seq_lengths_kv": ("batch",)},
        "output_dims": ("batch",),
        "warmup": 1,
    }
    return GraphRunner(lambda **inputs: fn(**inputs), driver=driver or NpuDriver(CPU), **(defaults | settings))


def test_every_replay_is_preceded_by_an_update_that_waits_for_the_last_one(npu):
    def fn(x, actual_seq_lengths_kv):
        return npu.attention(x, actual_seq_lengths_kv)

    runner = runner_of(fn)
    for lengths in ([5, 6, 7], [5, 6, 7], [1, 2, 3, 4]):
        x = torch.randn(len(lengths), 2)
        assert torch.equal(runner(x=x, actual_seq_lengths_kv=lengths), fn(x, lengths))
    assert runner.statistics.captures == 1
    assert npu.log[:4] == ["wait", "wait", "capture in (0, 1)", "waited for"]
    assert npu.log[4:] == ["synchronize", "update", "replay", "record"] * 3


def test_each_operator_gets_the_list_that_it_read(npu):
    """Two steps of a draft, between them attention without lengths and lengths of queries that are constant."""

    def fn(x, actual_seq_lengths_kv):
        first, second = actual_seq_lengths_kv
        x = npu.attention(x, first, lengths=[1, 1, 1, 1])
        return npu.attention(npu.attention(x, None), second)

    runner = runner_of(fn)
    for first, second in (([1, 2, 3, 4], [5, 6, 7, 8]), ([9, 9, 9, 9], [9, 9, 9, 9]), ([4, 3, 2, 1], [0, 0, 0, 0])):
        x = torch.randn(4, 2)
        assert torch.equal(runner(x=x, actual_seq_lengths_kv=[first, second]), fn(x, [first, second]))
    assert runner.statistics.captures == 1


@pytest.mark.parametrize(
    "lists, fn, text",
    [
        (
            [5, 6],
            lambda npu, x, lengths: npu.attention(x, [value + 1 for value in lengths]),
            r"an operator got actual_seq_lengths_kv = \[6, 7, 1, 1\], but the input is \[5, 6, 0, 0\]",
        ),
        (
            [5, 6],
            lambda npu, x, lengths: x,
            r"no operator of the captured run takes the list actual_seq_lengths_kv = \[5, 6, 0, 0\]",
        ),
        (
            [[5, 6], [5, 6]],
            lambda npu, x, lengths: npu.attention(npu.attention(x, lengths[0]), lengths[1]),
            r"an operator got actual_seq_lengths_kv = \[5, 6, 0, 0\], which 2 inputs are",
        ),
    ],
)
def test_a_list_that_an_update_would_lose_or_overwrite_is_an_error(npu, lists, fn, text):
    runner = runner_of(lambda x, actual_seq_lengths_kv: fn(npu, x, actual_seq_lengths_kv))
    with pytest.raises(CaptureError, match=text):
        runner(x=torch.ones(2, 2), actual_seq_lengths_kv=lists)
    assert npu.log[-1] == "reset"


def drivers(npu, monkeypatch):
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(cuda=npu))
    return {"npu": NpuDriver, "cuda": cuda.CudaDriver}


@pytest.fixture(params=["npu", "cuda"])
def driver(request, npu, monkeypatch):
    return drivers(npu, monkeypatch)[request.param](CPU)


def test_without_lists_a_replay_is_a_replay(npu, driver):
    runner = runner_of(lambda x: x + 1, driver)
    runner(x=torch.ones(4, 2))
    assert npu.log == ["wait", "wait", "capture in (0, 1)", "waited for", "replay"]
    assert runner.memory().pool == 64


def test_nothing_but_captures_runs_on_the_stream_that_captures(npu, driver):
    """What libraries allocate for that stream then lies in the pool of the graphs, and resetting one frees it there."""
    runner = runner_of(npu.run_on(lambda x: x + 1), driver, buckets=[2, 4], warmup=2)
    for batch in (4, 2):
        runner(x=torch.ones(batch, 2))
    runs = [call for call in npu.log if call.startswith("run")]
    assert runs == ["run on 0", "run on 0", "run on 1"] * 2


@pytest.mark.filterwarnings("ignore:sgl_npu. GraphRunner has freed")
def test_a_pool_whose_last_graph_was_freed_is_not_used_again_while_another_pool_has_graphs(npu, driver):
    runner = runner_of(lambda x, number: x + number, driver, max_graphs=2)
    runner(x=torch.ones(2, 2), number=0)
    npu.broken = True
    with pytest.raises(CaptureError):
        runner(x=torch.ones(2, 2), number=1)
    npu.broken = False
    for number in (2, 0, 3):  # 3 is captured in place of 2, the only one of the second pool
        runner(x=torch.ones(2, 2), number=number)
    captures = [call for call in npu.log if call.startswith(("capture", "reset"))]
    assert captures == [*(f"capture in (0, {pool})" for pool in (1, 1, 2)), "reset", "capture in (0, 3)"]


def test_after_a_capture_that_failed_the_stream_is_back_and_the_pool_another(npu, driver):
    failing = [True]

    def fn(x):
        if npu.log[-1].startswith("capture") and failing[0]:
            raise RuntimeError("the first cause")
        return x + 1

    runner = runner_of(fn, driver)
    npu.broken = True
    with pytest.raises(CaptureError, match="RuntimeError: the first cause"):
        runner(x=torch.ones(2, 2))
    assert npu.stream_now == "default"
    npu.broken, failing[0] = False, False
    runner(x=torch.ones(2, 2))
    assert "capture in (0, 2)" in npu.log


def test_after_a_capture_that_failed_the_random_numbers_of_a_gpu_are_what_they_were(npu, monkeypatch):
    def fn(x):
        if npu.log[-1].startswith("capture"):
            npu.default_generators[0].state = "recording"
            raise RuntimeError("the cause")
        return x

    runner = runner_of(fn, drivers(npu, monkeypatch)["cuda"](CPU))
    with pytest.raises(CaptureError, match="the cause"):
        runner(x=torch.ones(2, 2))
    assert npu.default_generators[0].state == "fresh"


@pytest.mark.filterwarnings("ignore:sgl_npu. GraphRunner has freed")
def test_when_the_last_graph_of_a_pool_is_freed_the_next_has_another(npu, driver):
    runner = runner_of(lambda x: x + 1, driver, max_graphs=1, buckets=[2, 4])
    for batch in (4, 2):
        runner(x=torch.ones(batch, 2))
    captures = [call for call in npu.log if call.startswith(("capture", "reset"))]
    assert captures == ["capture in (0, 1)", "reset", "capture in (0, 2)"]
