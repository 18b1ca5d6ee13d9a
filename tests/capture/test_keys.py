"""Which calls share a graph: those that differ in values of tensors, and nothing else."""

from __future__ import annotations

import enum
import math

import pytest
import torch
from capture.recording_driver import RecordingDriver

from sgl_npu import GraphRunner

X = torch.arange(24.0).reshape(2, 3, 4)


class Mode(enum.Enum):
    FIRST = 1
    SECOND = 2


def runner_of(fn, driver=None, **settings):
    defaults = {"buckets": [2], "dims": {"x": ("batch",)}, "output_dims": ("batch",)}
    return GraphRunner(fn, driver=driver or RecordingDriver(), **(defaults | settings))


def double(x, extra=None):
    return x * 2


DIFFER = {
    "int and bool": (1, True),
    "int and float": (1, 1.0),
    "numbers": (1, 2),
    "zeros": (0.0, -0.0),
    "None and 0": (None, 0),
    "None and a tensor": (None, torch.ones(2)),
    "texts": ("a", "b"),
    "members of an enum": (Mode.FIRST, Mode.SECOND),
    "dtypes as values": (torch.float16, torch.bfloat16),
    "dtypes": (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    "sizes": (torch.ones(2), torch.ones(3)),
    "dimensions": (torch.ones(2), torch.ones(2, 1)),
    "order in memory": (torch.ones(2, 3), torch.ones(3, 2).T),
    "list and tuple": ([torch.ones(2)], (torch.ones(2),)),
    "lengths of lists": ([torch.ones(2)], [torch.ones(2)] * 2),
    "nesting": ([[torch.ones(2)], torch.ones(2)], [torch.ones(2), [torch.ones(2)]]),
    "names": ({"a": torch.ones(2)}, {"b": torch.ones(2)}),
    "order of names": ({"a": torch.ones(2), "b": torch.ones(2)}, {"b": torch.ones(2), "a": torch.ones(2)}),
    "lists of ints": ([1, 2], [1, 3]),
    "lists of ints and of bools": ([1, 0], [True, False]),
    "shape as a value": (torch.Size([1, 2]), torch.Size([1, 3])),
    "shape and list": (torch.Size([1, 2]), [1, 2]),
}
SHARE = {
    "values": (torch.ones(2), torch.zeros(2)),
    "gaps in memory": (torch.ones(2, 3), torch.ones(2, 9)[:, ::3]),
    "expanded": (torch.ones(2, 3), torch.ones(2, 1).expand(2, 3)),
    "parameters": (torch.ones(2), torch.nn.Parameter(torch.ones(2), requires_grad=False)),
    "nan": (math.nan, math.nan),
    "equal values": ({"a": [1, (None, "b")]}, {"a": [1, (None, "b")]}),
}


@pytest.mark.parametrize("case", DIFFER)
def test_another_graph_for(case):
    runner = runner_of(double)
    for _ in range(2):
        for extra in DIFFER[case]:
            torch.testing.assert_close(runner(X, extra=extra), X * 2)
    assert (runner.statistics.captures, runner.statistics.replays) == (2, 4)


@pytest.mark.parametrize("case", SHARE)
def test_the_same_graph_for(case):
    runner = runner_of(double)
    for extra in SHARE[case]:
        runner(X, extra=extra)
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 2)


def test_a_python_value_is_that_of_its_own_graph():
    runner = runner_of(lambda x, scale: x * scale)
    for scale in (2, 3, 2, 3.5):
        assert torch.equal(runner(X, scale), X * scale)


def test_the_callable_sees_the_order_in_memory_of_the_caller():
    seen = []
    dims = (None, "batch")
    runner = runner_of(lambda x: seen.append(x.stride()) or x + 0, buckets=[4], dims={"x": dims}, output_dims=dims)
    x = torch.randn(3, 5, 2).transpose(0, 1).contiguous().transpose(0, 1)  # (3, 5, 2), the second dimension outermost
    y = x[:, :3]
    assert torch.equal(runner(y), y)
    assert set(seen) == {(2, 6, 1)}


def test_autocast_has_a_graph_of_its_own():
    weight = torch.randn(4, 4)
    runner = runner_of(lambda x: x @ weight)
    plain = runner(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert runner(X).dtype == torch.bfloat16
        assert torch.is_autocast_cache_enabled()
    assert torch.equal(runner(X), plain)
    assert runner.statistics.captures == 2


def test_nested_tensors_arrive_and_are_padded_by_their_path():
    def fn(batch):
        return batch["ids"][0] + 10 * batch["more"]["positions"] + batch["more"]["table"].sum()

    runner = runner_of(fn, buckets=[4], dims={"batch": ("batch",), "batch.more.table": ()})
    for size, table in [(4, 5), (3, 5), (2, 5)]:
        inputs = {"ids": [torch.arange(size)], "more": {"positions": torch.ones(size), "table": torch.arange(table)}}
        assert torch.equal(runner(inputs), fn(inputs))
    assert runner.statistics.captures == 1


# ---------------------------------------------------------------- lists on the host


def add_lengths(x, kv_lens):
    return x + torch.tensor(kv_lens)[:, None]


def lengths_runner(driver, fn=add_lengths):
    dims = {"x": ("batch",), "kv_lens": ("batch",)}
    lengths = {"kv_lens": "actual_seq_lengths_kv"}
    return runner_of(fn, driver, buckets=[4], dims=dims, lengths=lengths, pad={"kv_lens": 1})


def test_lengths_are_brought_up_to_date_in_every_replay_where_the_driver_can():
    driver = RecordingDriver("actual_seq_lengths_kv", "actual_seq_lengths")
    runner = lengths_runner(driver)
    for lengths in ([7, 8, 9], [1, 2, 3], [4, 5, 6, 7], (8, 9), [5]):
        x = torch.randn(len(lengths), 2)
        assert torch.equal(runner(x, lengths), add_lengths(x, lengths))
    kinds = 2  # a list and a tuple
    assert runner.statistics.captures == kinds
    assert driver.log.count("update") == driver.log.count("replay") == 5
    assert [call for call in driver.log if call != "capture"] == ["update", "replay"] * 5


def test_lengths_of_an_operator_s_own_name_need_no_entry():
    driver = RecordingDriver("actual_seq_lengths_kv")
    runner = runner_of(lambda x, meta: x + sum(meta["actual_seq_lengths_kv"]), driver)
    for lengths in ([1, 2, 3], [4, 5, 6]):
        assert torch.equal(runner(X, {"actual_seq_lengths_kv": lengths}), X + sum(lengths))
    assert runner.statistics.captures == 1


def test_lengths_are_part_of_the_key_where_the_driver_cannot():
    runner = lengths_runner(RecordingDriver())
    x = torch.randn(3, 2)
    for lengths in ([7, 8, 9], [1, 2, 3], [7, 8, 9]):
        assert torch.equal(runner(x, lengths), add_lengths(x, lengths))
    assert runner.statistics.captures == 2


def test_several_lists_are_each_brought_up_to_date():
    """As for several steps of a draft in one graph."""

    def fn(x, kv_lens):
        for lengths in kv_lens:
            x = x * 2 + torch.tensor(lengths)[:, None]
        return x

    runner = lengths_runner(RecordingDriver("actual_seq_lengths_kv"), fn)
    for first, second in (([1, 2], [3, 4]), ([5, 6], [7, 8]), ([9], [10]), ([0, 0], [0, 0])):
        x = torch.randn(len(first), 2)
        assert torch.equal(runner(x, [first, second]), fn(x, [first, second]))
    assert runner.statistics.captures == 1
