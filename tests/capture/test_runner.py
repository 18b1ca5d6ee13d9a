"""What a runner gives is what its callable gives, whatever was replayed before."""

from __future__ import annotations

import pytest
import torch
from capture.decode_step import DIMS, assert_same, decode, inputs_of, runner_of
from capture.recording_driver import RecordingDriver

import sgl_npu
from sgl_npu import GraphRunner


@pytest.fixture
def driver():
    return RecordingDriver()


@pytest.mark.parametrize("name", inputs_of())
def test_a_new_value_of_each_input_arrives(driver, name):
    runner = runner_of(decode, driver)
    first, second = inputs_of(seed=1), inputs_of(seed=2)
    runner(**first)
    changed = first | {name: second[name]}
    assert_same(runner(**changed), decode(**changed))
    assert not torch.equal(decode(**changed)["logits"], decode(**first)["logits"])
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 2)


def test_a_change_in_place_arrives(driver):
    runner, inputs = runner_of(decode, driver), inputs_of()
    runner(**inputs)
    inputs["input_embeds"] += 1
    assert_same(runner(**inputs), decode(**inputs))


def test_every_size_is_served_by_the_smallest_bucket_that_holds_it(driver):
    runner = runner_of(decode, driver)
    sizes = [(batch, tokens) for batch in (4, 1, 3, 2) for tokens in (1, 8, 5, 2)]
    for seed, size in enumerate(sizes):
        inputs = inputs_of(*size, seed=seed)
        assert_same(runner(**inputs), decode(**inputs))
    assert (runner.statistics.captures, runner.statistics.replays) == (3, len(sizes))
    assert not runner.statistics.eager


def test_what_an_earlier_call_left_in_the_padding_is_gone(driver):
    """NaN in every row, then a smaller call of a callable that mixes rows: only the padding asked for is exact."""

    def mixed(x):
        return x.sum((0, 1), keepdim=True).repeat(*x.shape[:2], 1)

    runner = GraphRunner(
        mixed,
        buckets=[(4, 8)],
        dims={"x": ("batch", "tokens")},
        output_dims=("batch", "tokens"),
        pad={"x": 0.25},
        driver=driver,
    )
    for batch, tokens in [(3, 5), (3, 8), (4, 5), (1, 1)]:
        runner(x=torch.full((4, 8, 2), torch.nan))
        x = torch.randint(0, 9, (batch, tokens, 2)).float()
        padding = 0.25 * (4 * 8 - batch * tokens)
        assert_same(runner(x=x), x.sum((0, 1)).add(padding).expand(x.shape))


def test_padding_is_zero_where_nothing_is_said(driver):
    runner = GraphRunner(
        lambda x: x.sum(0, keepdim=True).repeat(len(x)),
        buckets=[4],
        dims={"x": ("batch",)},
        output_dims=("batch",),
        driver=driver,
    )
    assert runner(x=torch.ones(3)).tolist() == [3.0] * 3


def test_an_empty_batch_is_all_padding(driver):
    runner, inputs = runner_of(decode, driver), inputs_of(batch=0)
    assert_same(runner(**inputs), decode(**inputs))


def test_inputs_by_position_and_by_name_share_a_graph(driver):
    runner, inputs = runner_of(decode, driver), inputs_of()
    runner(**inputs)
    assert_same(runner(*inputs.values()), decode(**inputs))
    backwards = dict(reversed(inputs.items()))
    assert_same(runner(**backwards), decode(**inputs))
    assert runner.statistics.captures == 1


@pytest.mark.parametrize(
    "args, kwargs, text",
    [
        ((torch.ones(1),) * 8, {}, "8 inputs by position"),
        ((torch.ones(1),), {"input_ids": 1}, "by position and by name"),
    ],
)
def test_inputs_that_have_no_one_name_are_a_type_error(driver, args, kwargs, text):
    with pytest.raises(TypeError, match=text):
        runner_of(decode, driver)(*args, **kwargs)


def test_a_module_runs_by_the_names_of_its_forward(driver):
    class Module(torch.nn.Module):
        def forward(self, x, y):
            return x - y

    module = Module()
    for fn in (module, torch.compile(module, backend="eager")):
        dims = {"x": ("batch",), "y": ("batch",)}
        runner = GraphRunner(fn, buckets=[4], dims=dims, output_dims=("batch",), driver=driver)
        assert runner(torch.arange(3), torch.ones(3)).tolist() == [-1.0, 0.0, 1.0]


def test_parameters_are_read_where_they_lie(driver):
    linear = torch.nn.Linear(3, 3)
    runner = GraphRunner(linear, buckets=[2], dims={"input": ("batch",)}, output_dims=("batch",), driver=driver)
    x = torch.randn(2, 3)
    with torch.no_grad():
        runner(x)
        linear.weight += 1
        assert_same(runner(x), linear(x))


def test_inputs_that_the_callable_writes_to_are_written(driver):
    def count(x, counter):
        counter += 1
        return x + counter

    dims = {"x": ("batch",), "counter": ("batch",)}
    runner = GraphRunner(count, buckets=[4], dims=dims, output_dims=("batch",), driver=driver)
    counter = torch.tensor([5, 6, 7])
    for more in (1, 2, 3):
        assert runner(x=torch.zeros(3), counter=counter).tolist() == [5 + more, 6 + more, 7 + more]
    assert counter.tolist() == [8, 9, 10]


def test_so_are_those_that_are_written_to_without_torch_knowing(driver):
    """As by a kernel that is launched directly."""

    def fn(x, cache):
        cache.data.add_(x)
        return cache + x

    runner = GraphRunner(fn, buckets=[4], dims={"x": ("batch",)}, output_dims=("batch",), driver=driver, warmup=1)
    x, cache, expected = torch.ones(4), torch.full((4,), torch.nan), torch.full((4,), torch.nan)
    cache[1], expected[1] = 5.0, 5.0
    for _ in range(3):
        assert_same(runner(x, cache), fn(x, expected))
        assert_same(cache, expected)


def test_so_are_those_that_compiled_code_writes_to(driver):
    def count(x, counter):
        counter += 1
        return x + counter

    compiled = torch.compile(count, backend="aot_eager")
    dims = {"x": ("batch",), "counter": ("batch",)}
    for mode in (torch.no_grad, torch.inference_mode):
        runner = GraphRunner(compiled, buckets=[4], dims=dims, output_dims=("batch",), driver=driver)
        with mode():
            counter = torch.tensor([5, 6, 7])
            runner(x=torch.zeros(3), counter=counter)
            assert runner(x=torch.zeros(3), counter=counter).tolist() == counter.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    "first, second", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_a_graph_serves_calls_in_and_out_of_inference_mode(driver, first, second):
    runner = runner_of(decode, driver)
    for mode in (first, second):
        for batch in (4, 3):
            with mode():
                inputs = inputs_of(batch)
                assert_same(runner(**inputs), decode(**inputs))


def test_buckets_are_captured_ahead_from_the_largest(driver):
    seen = []

    def noted(**inputs):
        seen.append(tuple(inputs["input_ids"].shape))
        return decode(**inputs)

    runner = runner_of(noted, driver, warmup=1)
    runner.capture(**inputs_of(3, 5))
    assert seen == [(4, 8)] * 2 + [(4, 1)] * 2 + [(1, 1)] * 2
    assert (runner.statistics.captures, runner.statistics.replays) == (3, 0)
    for size in [(1, 1), (2, 1), (4, 7)]:
        inputs = inputs_of(*size)
        assert_same(runner(**inputs), decode(**inputs))
    assert runner.statistics.captures == 3


def test_a_graph_is_warmed_up_as_often_as_asked(driver):
    runs = []
    runner = GraphRunner(
        lambda x: runs.append(1) or x,
        buckets=[2],
        dims={"x": ("batch",)},
        output_dims=("batch",),
        warmup=5,
        driver=driver,
    )
    runner(x=torch.ones(2))
    assert len(runs) == 5 + 1 + 1  # warmed up, captured, replayed


def test_memory_is_told_by_bucket(driver):
    runner = runner_of(decode, driver)
    runner(**inputs_of(4, 1))
    runner(**inputs_of(4, 8))
    memory = runner.memory()
    outputs = {(4, 1): 4 * (3 * 4 + 8), (4, 8): 32 * (3 * 4 + 8)}
    inputs = {(4, 1): 4 * (8 + 8 + 12 + 1) + 12, (4, 8): 32 * (8 + 8 + 12 + 1) + 12}
    assert memory.buckets == {bucket: outputs[bucket] + inputs[bucket] for bucket in outputs}
    assert memory.pool == sum(outputs.values())
    runner.clear()
    assert (runner.memory().pool, runner.memory().buckets) == (0, {})


def test_memory_is_that_of_the_inputs_where_the_device_does_not_tell():
    runner = runner_of(decode, RecordingDriver(tells_bytes=False))
    runner(**inputs_of(1, 1))
    assert (runner.memory().pool, runner.memory().buckets) == (None, {(1, 1): 8 + 8 + 12 + 1 + 12})


@pytest.mark.filterwarnings("ignore:sgl_npu. GraphRunner has freed")
def test_the_graph_that_was_not_used_for_longest_is_freed(driver):
    runner = runner_of(decode, driver, max_graphs=2)
    small, middle, large = inputs_of(1), inputs_of(3), inputs_of(3, 8)
    for inputs in (small, middle, small, large, small, middle):
        assert_same(runner(**inputs), decode(**inputs))
    assert [call for call in driver.log if call != "replay"] == [
        "capture",
        "capture",
        "free",
        "capture",
        "free",
        "capture",
    ]
    assert (runner.statistics.captures, runner.statistics.evictions) == (4, 2)
    assert set(runner.memory().buckets) == {(1, 1), (4, 1)}


def test_graphs_that_are_freed_as_often_as_kept_are_warned_of(driver):
    runner = runner_of(decode, driver, max_graphs=1)
    runner(**inputs_of(), scale=1.0)
    with pytest.warns(UserWarning, match=r"max_graphs = 1.*pass numbers and lists that change.*as tensors"):
        runner(**inputs_of(), scale=2.0)


def test_dims_of_unnamed_inputs_are_exact(driver):
    """Without an entry an input keeps its sizes: another size is another graph."""
    dims = {name: names for name, names in DIMS.items() if name != "bias"}
    runner = runner_of(decode, driver, dims=dims)
    for bias in (torch.ones(3), torch.ones(1)):
        inputs = inputs_of() | {"bias": bias}
        assert_same(runner(**inputs), decode(**inputs))
    assert runner.statistics.captures == 2


@torch.no_grad()
def test_a_model_compiled_by_the_backend_is_captured_and_replayed(driver):
    """Attention of new tokens to a cache of the module, which it writes where the inputs say."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(8, 8)
            self.register_buffer("cache", torch.randn(4, 16, 8))

        def forward(self, hidden, positions):
            rows = torch.arange(len(hidden))[:, None]
            self.cache[rows, positions] = hidden
            query, keys = self.project(hidden), self.cache[: len(hidden)]
            mask = torch.arange(16) <= positions[:, :, None]
            scores = (query @ keys.transpose(1, 2)).masked_fill(~mask, float("-inf"))
            return scores.softmax(-1) @ keys

    torch.manual_seed(0)
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    before = len(sgl_npu.reports())
    compiled = torch.compile(model, backend="sgl_npu", options={"inner": "eager", "strict": True})
    dims = {"hidden": ("batch", "tokens"), "positions": ("batch", "tokens")}
    runner = GraphRunner(compiled, buckets=[(4, 2)], dims=dims, output_dims=("batch", "tokens"), driver=driver)
    for step in range(4):
        for batch in (4, 2):
            hidden, positions = torch.randn(batch, 2, 8), torch.tensor([[2 * step, 2 * step + 1]] * batch)
            found, expected = runner(hidden, positions), twin(hidden, positions)
            torch.testing.assert_close(found[:2], expected[:2], atol=1e-5, rtol=1e-5)
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 8)
    assert sgl_npu.reports()[before].fused == 1
