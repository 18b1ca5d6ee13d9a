"""Calls without a graph: run eagerly, counted, with a reason; and errors that say what to do."""

from __future__ import annotations

import re

import pytest
import torch
from capture.decode_step import DIMS, assert_same, decode, inputs_of, runner_of
from capture.recording_driver import RecordingDriver

from sgl_npu import CaptureError, GraphRunner


class Unknown:
    pass


@pytest.fixture
def driver():
    return RecordingDriver()


def eager_reasons(runner):
    return dict(runner.statistics.eager), runner.statistics.last_eager_reason


@pytest.mark.parametrize("size", [(5, 1), (4, 9)])
def test_calls_that_no_bucket_holds_run_eagerly(driver, size):
    runner, inputs = runner_of(decode, driver), inputs_of(*size)
    assert_same(runner(**inputs), decode(**inputs))
    reason = f"batch {size[0]}, tokens {size[1]}: no bucket holds it"
    assert eager_reasons(runner) == ({"no bucket is large enough": 1}, reason)
    assert driver.log == []


def test_inputs_that_require_grad_run_eagerly_with_their_backward(driver):
    runner, inputs = runner_of(decode, driver), inputs_of()
    inputs["input_embeds"].requires_grad_()
    runner(**inputs)["logits"].sum().backward()
    assert inputs["input_embeds"].grad is not None
    counts, reason = eager_reasons(runner)
    assert counts == {"an input requires grad": 1}
    assert reason.startswith("input_embeds requires grad")
    with torch.no_grad():
        runner(**inputs)
    assert runner.statistics.replays == 1


@pytest.mark.parametrize(
    "change, rule, reason",
    [
        (
            {"bias": torch.ones(3, device="meta")},
            "an input is on another device",
            "bias is on meta, and the graphs are on cpu",
        ),
        (
            {"position_ids": torch.ones(1, 1)},
            "inputs differ in size",
            "batch is 2 in input_embeds and 1 in position_ids",
        ),
        ({"extra": Unknown()}, "an input of unknown kind", "extra is a Unknown.*register"),
        ({"extra": [{"a": Unknown()}]}, "an input of unknown kind", r"extra\.0\.a is a Unknown"),
        (
            {"extra": torch.ones(2, 2).to_sparse()},
            "an input is no plain tensor",
            "extra is a tensor of layout torch.sparse_coo",
        ),
    ],
)
def test_calls_that_no_graph_can_stand_for_run_eagerly(driver, change, rule, reason):
    calls = []

    def fn(**inputs):
        calls.append(inputs)
        return "eager"

    runner = runner_of(fn, driver)
    assert runner(**(inputs_of() | change)) == "eager"
    counts, found = eager_reasons(runner)
    assert counts == {rule: 1}
    assert re.match(reason, found)
    assert len(calls) == 1


def test_without_a_device_that_has_graphs_everything_runs_eagerly():
    runner, inputs = runner_of(decode, None), inputs_of()
    assert_same(runner(**inputs), decode(**inputs))
    assert runner.statistics.eager == {"no device that has graphs": 1}
    assert runner.memory().pool is None


# ---------------------------------------------------------------- captures that fail


def capture_breaker(driver, batch=4):
    """Like an operation that is not allowed in a capture, in one bucket."""

    def fn(**inputs):
        if driver.capturing and inputs["input_ids"].shape[0] == batch:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return decode(**inputs)

    return fn


def test_a_failed_capture_names_the_bucket_the_cause_and_the_remedy(driver):
    runner = runner_of(capture_breaker(driver), driver)
    with pytest.raises(CaptureError) as caught:
        runner(**inputs_of(3))
    text = str(caught.value)
    assert "the bucket of batch 4, tokens 1: RuntimeError: operation not permitted when stream is capturing. A" in text
    assert "must not read a tensor's value on the host" in text
    assert "on_error='eager'" in text
    assert isinstance(caught.value.__cause__, RuntimeError)
    runner(**inputs_of(1))
    assert runner.statistics.replays == 1


@pytest.mark.parametrize(
    "error, remedy",
    [
        (
            ValueError("no such length"),
            "ValueError: no such length. The callable raised it before anything was captured",
        ),
        (torch.OutOfMemoryError("out of memory"), "Give fewer or smaller buckets, or a lower max_graphs"),
    ],
)
def test_what_the_callable_raises_while_it_is_warmed_up_has_a_remedy_of_its_own(driver, error, remedy):
    def fn(x):
        raise error

    runner = GraphRunner(fn, buckets=[4], dims={"x": ("batch",)}, output_dims=("batch",), driver=driver)
    with pytest.raises(CaptureError) as caught:
        runner(torch.ones(2))
    assert remedy in str(caught.value) and "on the host" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_what_could_not_be_captured_is_tried_again_after_clear(driver):
    broken = [True]

    def fn(**inputs):
        if broken[0] and driver.capturing:
            raise RuntimeError("out of luck")
        return decode(**inputs)

    runner = runner_of(fn, driver, on_error="eager")
    with pytest.warns(UserWarning, match="out of luck"):
        runner(**inputs_of())
    broken[0] = False
    runner(**inputs_of())
    assert runner.statistics.replays == 0
    runner.clear()
    runner(**inputs_of())
    assert runner.statistics.replays == 1


def test_or_such_calls_run_eagerly_and_are_not_tried_again(driver):
    runner = runner_of(capture_breaker(driver), driver, on_error="eager")
    with pytest.warns(UserWarning, match="batch 4, tokens 1.*such calls run eagerly from now on"):
        found = runner(**inputs_of(3))
    assert_same(found, decode(**inputs_of(3)))
    runner(**inputs_of(2))
    counts, reason = eager_reasons(runner)
    assert counts == {"the bucket could not be captured": 2}
    assert "operation not permitted" in reason
    assert driver.log == []


def test_capturing_ahead_says_what_stands_in_its_way(driver):
    runner = runner_of(decode, driver)
    with pytest.raises(CaptureError, match=r"GraphRunner\.capture: extra is a Unknown"):
        runner.capture(**inputs_of(), extra=Unknown())
    with pytest.raises(ValueError, match="max_graphs = 2: at least 3, one for each bucket"):
        runner_of(decode, driver, max_graphs=2).capture(**inputs_of())


def test_capturing_ahead_leaves_out_what_fails(driver):
    runner = runner_of(capture_breaker(driver, batch=1), driver, on_error="eager")
    with pytest.warns(UserWarning, match="batch 1, tokens 1"):
        runner.capture(**inputs_of())
    assert runner.statistics.captures == 2


def test_errors_of_the_callable_itself_are_its_own_when_it_runs_eagerly(driver):
    def fn(**inputs):
        raise LookupError("mine")

    runner = runner_of(fn, driver, on_error="eager")
    with pytest.warns(UserWarning), pytest.raises(LookupError, match="mine"):
        runner(**inputs_of())


def test_an_input_of_fewer_dimensions_than_declared_is_an_error(driver):
    with pytest.raises(ValueError, match=r"input_ids has 1 dimensions, but dims names 2: \('batch', 'tokens'\)"):
        runner_of(decode, driver)(**(inputs_of() | {"input_ids": torch.ones(2)}))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"buckets": []}, "buckets is empty: give the sizes"),
        ({"buckets": [(0, 1)]}, r"buckets: \(0, 1\) is no bucket.*from 1 on"),
        ({"buckets": [(1, -1)]}, r"buckets: \(1, -1\) is no bucket"),
        ({"buckets": [(1, 2, 3)]}, r"buckets: \(1, 2, 3\) is no bucket"),
        ({"buckets": [(1.0, 1)]}, r"buckets: \(1\.0, 1\) is no bucket"),
        ({"buckets": [True]}, r"buckets: True is no bucket"),
        ({"buckets": [None]}, r"buckets: None is no bucket"),
        ({"dims": {"input_ids": ("batch", "token")}}, "dims\\['input_ids'\\]: unknown dimension 'token'.*'tokens'"),
        ({"dims": {"input_ids": "batch"}}, "dims\\['input_ids'\\] = 'batch': name the dimensions in a tuple"),
        (
            {"dims": {"input_id": ("batch", "tokens")}},
            "dims: the callable has no input 'input_id': did you mean 'input_ids'",
        ),
        ({"dims": {"input_ids": ("batch",)}}, r"buckets: \(4, 8\) has tokens 8, but no input of `dims`"),
        ({"output_dims": ("rows",)}, "output_dims\\[''\\]: unknown dimension 'rows'"),
        ({"pad": {"masks": 0}}, "pad: the callable has no input 'masks': did you mean 'mask'"),
        (
            {"lengths": {"zzz": "actual_seq_lengths"}},
            "lengths: the callable has no input 'zzz': its inputs are input_ids",
        ),
        ({"outputs": "clone"}, "outputs = 'clone': choose 'copy' or 'view'"),
        ({"on_error": "warn"}, "on_error = 'warn': choose 'raise' or 'eager'"),
        ({"max_graphs": 0}, "max_graphs = 0: give an int from 1 on"),
        ({"max_graphs": True}, "max_graphs = True: give an int from 1 on"),
        ({"warmup": 0}, "warmup = 0: give an int from 1 on"),
        ({"buckets": 4}, "buckets = 4: give a list of sizes"),
        ({"dims": ("batch",)}, r"dims = \('batch',\): give a dict by the input's name, such as {'input_ids'"),
        ({"pad": -1}, "pad = -1: give a dict by the input's name, such as {'slots': -1}"),
        ({"lengths": ["kv_lens"]}, r"lengths = \['kv_lens'\]: give a dict by the input's name, such as {'seq_lens'"),
    ],
)
def test_settings_that_make_no_sense_are_one_clear_error(driver, settings, text):
    with pytest.raises(ValueError, match=text):
        runner_of(decode, driver, **settings)


def test_what_cannot_be_called_is_no_callable():
    with pytest.raises(ValueError, match="fn = 3: give a function or a module"):
        GraphRunner(3, buckets=[2], dims={"x": ("batch",)}, output_dims=("batch",))


@pytest.mark.parametrize("value, dtype", [(0.5, torch.int64), (-1, torch.uint8), (2, torch.bool), ("a", torch.float32)])
def test_padding_that_an_input_cannot_hold_is_an_error(driver, value, dtype):
    runner = GraphRunner(
        lambda x: x, buckets=[4], dims={"x": ("batch",)}, output_dims=("batch",), pad={"x": value}, driver=driver
    )
    with pytest.raises(ValueError, match=rf"pad\['x'\] = {value!r}: x is {dtype}, pad it with a number of that dtype"):
        runner(torch.ones(2, dtype=dtype))


def test_a_path_that_almost_names_a_nested_input_is_an_error_and_one_of_what_is_absent_is_none(driver):
    def runner(path):
        return GraphRunner(
            lambda masks: masks["mask"],
            buckets=[4],
            dims={"masks": ("batch",)},
            output_dims=("batch",),
            pad={path: 1},
            driver=driver,
        )

    with pytest.raises(ValueError, match=r"pad\['masks.msk'\]: there is no 'masks.msk': did you mean 'masks.mask'?"):
        runner("masks.msk")({"mask": torch.ones(2)})
    assert runner("masks.offsets")({"mask": torch.ones(2)}).shape == (2,)


def test_a_list_that_no_operator_takes_is_an_error():
    with pytest.raises(
        ValueError, match=r"lengths\['extra'\] = 'lens': no operator takes.*they take actual_seq_lengths_kv"
    ):
        runner_of(decode, RecordingDriver("actual_seq_lengths_kv"), lengths={"extra": "lens"})


def test_inputs_of_a_callable_that_takes_anything_are_not_checked(driver):
    runner = GraphRunner(
        lambda **inputs: inputs["x"], buckets=[2], dims={"x": ("batch",)}, output_dims=("batch",), driver=driver
    )
    assert runner(x=torch.ones(1)).tolist() == [1.0]


def test_dims_say_what_an_input_may_be_not_what_must_be_given(driver):
    """An input that is None has no size."""
    runner = runner_of(decode, driver, dims=DIMS | {"extra": ("batch",)})
    inputs = inputs_of() | {"extra": None}
    assert_same(runner(**inputs), decode(**inputs))
