"""GraphRunner on torch_npu: everything but the capture itself, which the stand-in cannot begin."""

import inspect
from unittest.mock import Mock

import pytest
import torch
from capture.recording_driver import RecordingDriver
from hand_over_cases import BF16, compiled, to_npu
from serving_cases import STEPS
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch_npu.npu import graphs
from torch_npu.npu._npugraph_handlers.npugraph_handler import _NPU_GRAPH_OP_HANDLERS

import sgl_npu
from sgl_npu import CaptureError, GraphRunner
from sgl_npu.runtime.capture.npu import NpuDriver

NPU = torch.device("npu:0")
CANNOT_BEGIN = "RuntimeError: Failed to find function aclmdlRICaptureBegin"
# The ways to compile for a runner that docs/capture.md names.
OPTIONS = {"eager": {"inner": "eager"}, "npugraph_ex": {"inner_options": {"force_eager": True}}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# ---------------------------------------------------------------- what the driver takes from torch_npu


def test_lists_that_replays_update_are_those_of_torch_npu_s_handlers():
    found = {key for name, handler in _NPU_GRAPH_OP_HANDLERS.items() for _, _, key in handler.get_update_specs(name)}
    assert NpuDriver(NPU).update_keys == found
    assert found >= {"actual_seq_lengths", "actual_seq_lengths_kv", "actual_seq_qlen", "actual_seq_kvlen"}


@pytest.mark.parametrize(
    "function, by_position, by_name",
    [
        (torch.npu.graph, 1, ["pool", "stream", "auto_dispatch_capture"]),
        (torch.npu.graph_pool_handle, 0, []),
        (torch.npu.NPUGraph.update, 1, ["cpu_update_input"]),
        (torch.npu.NPUGraph.replay, 1, []),
        (torch.npu.NPUGraph.reset, 1, []),
        (torch.npu.Stream.wait_stream, 2, []),
        (torch.npu.Event.record, 1, []),
        (torch.npu.Event.synchronize, 1, []),
    ],
)
def test_torch_npu_takes_what_the_driver_passes(function, by_position, by_name):
    inspect.signature(function).bind(*range(by_position), **dict.fromkeys(by_name))


def test_the_allocator_tells_the_pool_of_each_segment():
    x = torch.ones(3, device=NPU)
    segments = torch.npu.memory_snapshot()
    outside = [segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == (0, 0)]
    assert sum(outside) >= x.nbytes
    assert tuple(torch.npu.graph_pool_handle()) != (0, 0)
    assert NpuDriver(NPU).pool_bytes() == 0


# ---------------------------------------------------------------- a capture that does not begin


def doubled(x, actual_seq_lengths_kv=None):
    return x * 2


def runner_of(fn, **settings):
    return GraphRunner(fn, buckets=[4], dims={"x": ("batch",)}, output_dims=("batch",), **settings)


def test_warm_up_runs_on_one_stream_of_its_own():
    streams = []
    runner = runner_of(lambda x: streams.append(torch.npu.current_stream()) or x, warmup=2)
    with pytest.raises(CaptureError):
        runner(x=torch.ones(3, device=NPU))
    first, second = streams
    assert first == second != torch.npu.default_stream()


@pytest.mark.parametrize("lists", [{}, {"actual_seq_lengths_kv": [5, 6, 7]}], ids=["no list", "a list"])
def test_a_capture_that_cannot_begin_leaves_no_stream_and_no_mode_behind(lists):
    runner, stream = runner_of(doubled), torch.npu.Stream()
    with torch.npu.stream(stream):
        with pytest.raises(CaptureError, match=f"batch 4, tokens 1: {CANNOT_BEGIN}"):
            runner(x=torch.ones(3, device=NPU), **lists)
        assert torch.npu.current_stream() == stream
    assert torch.npu.current_stream() == torch.npu.default_stream()
    assert _get_current_dispatch_mode() is None


def test_or_the_call_runs_eagerly_with_a_warning():
    runner, x = runner_of(doubled, on_error="eager"), torch.arange(3, device=NPU)
    with pytest.warns(UserWarning, match=f"{CANNOT_BEGIN}.*such calls run eagerly from now on"):
        found = runner(x=x)
    assert found.device == NPU and found.tolist() == runner(x=x).tolist() == [0, 2, 4]
    assert runner.statistics.eager == {"the bucket could not be captured": 2}


# ---------------------------------------------------------------- operators as torch_npu records them


@pytest.fixture
def immediate(monkeypatch):
    """What a capture lacks does nothing, so operators run at once: in a capture and in an update."""
    for name in ("group_begin", "group_end", "update_begin", "update_end"):
        monkeypatch.setattr(graphs, f"graph_task_{name}", lambda *_: None)
    for name in ("capture_begin", "capture_end", "replay"):
        monkeypatch.setattr(torch.npu.NPUGraph, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.npu, "ExternalEvent", Mock)


@pytest.mark.parametrize(
    "name, heads, key",
    [
        ("npu_fused_infer_attention_score", "num_heads", "actual_seq_lengths_kv"),
        ("npu_fused_infer_attention_score_v2", "num_query_heads", "actual_seq_kvlen"),
    ],
)
def test_each_operator_that_torch_npu_records_gets_its_own_list(immediate, name, heads, key):
    operator = getattr(torch.ops.npu, name)

    def fn(x, keys, lengths):
        given = {heads: 2, "input_layout": "BSND"}
        return tuple(operator(x, keys, keys, **given, **{key: values})[0] for values in lengths)

    runner = runner_of(fn, lengths={"lengths": key})
    for lengths in ([[5, 6, 7, 8], [1, 2, 3, 4]], [[9, 1, 9, 1], [2, 2, 2, 2]], [[3, 3, 3, 3], [3, 3, 3, 3]]):
        inputs = {name: torch.randn(4, rows, 2, 64, dtype=BF16).to(NPU) for name, rows in (("x", 1), ("keys", 9))}
        assert same(runner(**inputs, lengths=lengths), fn(**inputs, lengths=lengths))
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 3)


# ---------------------------------------------------------------- a step of a serving engine


NAMES = ("query", "key", "value", "key_cache", "value_cache", "slots", "table", "ends", "lengths")
STEP, CALLS, KERNEL, _ = STEPS["drafts"]
FIRST, SECOND, _ = (dict(zip(NAMES, call, strict=True)) for call in CALLS)
SECOND |= {"table": FIRST["table"].flip(0), "ends": [2, 9, 12]}


def step_runner(fn, driver=None):
    """Its bucket holds one sequence and two tokens more than the calls have."""
    return GraphRunner(
        fn,
        buckets=[(4, 14)],
        dims={name: ("tokens",) for name in ("query", "key", "value", "slots")}
        | {name: ("batch",) for name in ("table", "lengths")},
        output_dims=("tokens",),
        pad={"slots": -1, "lengths": 2},
        lengths={"ends": "actual_seq_lengths", "lengths": "actual_seq_lengths_kv"},
        warmup=1,
        driver=driver,
    )


def result(fn, inputs, padding=()):
    """The output, and the caches that were written."""
    given = to_npu(inputs) | {"ends": [*inputs["ends"], *padding]}
    with torch.no_grad():
        return fn(**given), given["key_cache"], given["value_cache"]


@pytest.fixture(scope="module", params=OPTIONS)
def compiled_step(request):
    return compiled(STEP, OPTIONS[request.param], dynamic=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_value_of_each_input_of_a_compiled_step_arrives(compiled_step, name):
    driver = RecordingDriver(*NpuDriver(NPU).update_keys)
    driver.device = NPU
    runner, changed = step_runner(compiled_step, driver), FIRST | {name: SECOND[name]}
    assert same(result(runner, FIRST, padding=[14]), result(compiled_step, FIRST))
    expected = result(compiled_step, changed)
    assert same(result(runner, changed, padding=[14]), expected)
    assert not same(expected, result(compiled_step, FIRST))
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 2)
    assert sgl_npu.reports()[-1].sites[0].kernel == KERNEL


def test_torch_npu_records_the_attention_of_a_compiled_step_with_both_lists(immediate, compiled_step):
    runner = step_runner(compiled_step)
    runner.capture(**to_npu(FIRST | {"ends": [*FIRST["ends"], 14]}))
    assert runner.statistics.captures == 1
