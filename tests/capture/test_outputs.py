"""Outputs are safe to keep, keep their structure, and are cut back to the size of the call."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import pytest
import torch
from capture.decode_step import assert_same, decode, inputs_of, runner_of
from capture.recording_driver import RecordingDriver
from torch.utils import _pytree as pytree

from sgl_npu import CaptureError, GraphRunner

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Output:
    """As model libraries return: fields of which some are None."""

    logits: torch.Tensor
    cache: list
    loss: None = None


pytree.register_pytree_node(Output, lambda x: ([x.logits, x.cache, x.loss], None), lambda values, _: Output(*values))


@dataclasses.dataclass
class Unregistered:
    logits: torch.Tensor


@pytest.fixture
def driver():
    return RecordingDriver()


def runner_for(fn, driver, **settings):
    defaults = {"buckets": [4], "dims": {"x": ("batch",)}, "output_dims": ("batch",)}
    return GraphRunner(fn, driver=driver, **(defaults | settings))


@pytest.mark.parametrize("batch", [4, 3])
def test_what_was_handed_out_outlives_later_replays(driver, batch):
    runner = runner_of(decode, driver)
    calls = [inputs_of(batch, seed=seed) for seed in range(3)] + [inputs_of(batch, 8), inputs_of(1, 1)]
    kept = [runner(**inputs) for inputs in calls]
    for found, inputs in zip(kept, calls, strict=True):
        assert_same(found, decode(**inputs))


def test_what_was_handed_out_outlives_its_graph(driver):
    runner, inputs = runner_of(decode, driver), inputs_of()
    found = runner(**inputs)
    runner.clear()
    assert_same(found, decode(**inputs))


def test_a_caller_may_write_to_what_it_got(driver):
    runner, inputs = runner_of(decode, driver), inputs_of()
    runner(**inputs)["logits"].zero_()
    assert_same(runner(**inputs), decode(**inputs))


def test_an_input_that_is_returned_is_a_copy(driver):
    runner = runner_for(lambda x: x, driver)
    first = runner(torch.ones(3))
    runner(torch.zeros(3))
    assert first.tolist() == [1.0] * 3


def test_views_are_the_memory_of_the_graph_for_callers_that_consume_at_once(driver):
    runner = runner_of(decode, driver, outputs="view")
    first, second = inputs_of(3, seed=1), inputs_of(3, seed=2)
    before = runner(**first)
    assert_same(before, decode(**first))
    after = runner(**second)
    assert_same(after, decode(**second))
    assert after["logits"].data_ptr() == before["logits"].data_ptr()
    assert_same(before, decode(**second))


STRUCTURES = {
    "tensor": lambda x: x + 1,
    "tuple": lambda x: (x + 1, None, x + 2),
    "list": lambda x: [x + 1, [x + 2]],
    "dict": lambda x: {"a": x + 1, "b": {"c": (x + 2, None)}},
    "named tuple": lambda x: Pair(x + 1, "text"),
    "registered class": lambda x: Output(x + 1, [x + 2, x + 3]),
    "tuple of a tuple": lambda x: ((x + 1,), (x + 2,)),
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("outputs", ["copy", "view"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_structure_is_that_of_the_callable(driver, structure, outputs):
    fn = STRUCTURES[structure]
    runner = runner_for(fn, driver, outputs=outputs)
    for batch in (4, 3, 1):
        x = torch.randn(batch, 2)
        found, expected = runner(x), fn(x)
        assert type(found) is type(expected)
        for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            assert_same(one, other) if isinstance(other, torch.Tensor) else None
            assert type(one) is type(other)


def test_outputs_of_transformers_keep_their_class(driver):
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def model(x):
        return outputs.CausalLMOutputWithPast(logits=x + 1, hidden_states=(x, x + 2))

    runner = runner_for(model, driver, output_dims={"logits": ("batch",), "hidden_states": ("batch",)})
    x = torch.randn(3, 2)
    found = runner(x)
    assert type(found) is outputs.CausalLMOutputWithPast
    assert found.loss is None
    assert_same(found.logits, x + 1)
    assert_same(found.hidden_states[1], x + 2)


def test_output_dims_are_by_path(driver):
    """A size that happens to be the batch's is not cut, and a dimension may stand anywhere."""

    def model(x):
        return {"square": x.T @ x, "last": [x.T, x]}

    dims = {"square": (), "last": (None, "batch"), "last.1": ("batch",)}
    runner = runner_for(model, driver, output_dims=dims)
    x = torch.randn(3, 4)
    found = runner(x)
    assert [tuple(y.shape) for y in pytree.tree_leaves(found)] == [(4, 4), (4, 3), (3, 4)]
    assert_same(found["last"], [x.T, x])


@pytest.mark.parametrize(
    "fn, text",
    [
        (lambda x: x.sum(), r"the output has shape \(\), but output_dims calls its dimension 0 'batch', which is 4"),
        (lambda x: {"a": x.T}, r"a has shape \(2, 4\).*output_dims by path"),
        (lambda x: (x, len(x)), "1 is of type int, which a replay cannot bring up to date: return tensors"),
        (lambda x: [Unregistered(x)], "0 is of type Unregistered.*register_pytree_node"),
    ],
)
def test_what_no_replay_brings_up_to_date_is_an_error(driver, fn, text):
    with pytest.raises(CaptureError, match=rf"bucket of batch 4, tokens 1: {text}"):
        runner_for(fn, driver)(torch.ones(3, 2))
    assert driver.log == ["capture", "free"]


def test_an_entry_of_no_output_is_an_error_while_an_output_has_none(driver):
    runner = runner_for(lambda x: {"logits": x}, driver, output_dims={"logit": ("batch",)})
    with pytest.raises(CaptureError, match=r"'logit', which is not among the outputs, and none for 'logits': rename"):
        runner(torch.ones(2))


def test_an_entry_may_be_of_an_output_that_only_some_calls_have(driver):
    runner = runner_for(
        lambda x: {"logits": x, "loss": x.sum()}, driver, output_dims={"logits": ("batch",), "loss": (), "hidden": ()}
    )
    assert runner(torch.ones(2))["logits"].shape == (2,)
