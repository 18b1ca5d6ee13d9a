"""Graphs of a real GPU: captured, replayed over several sizes, freed. Skipped where there is none."""

import pytest
import torch

from sgl_npu import CaptureError, GraphRunner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; the runner is tested with a recording driver"),
]
HIDDEN, HEADS, CACHE = 64, 4, 32
DIMS = {"input_ids": ("batch", "tokens"), "position_ids": ("batch", "tokens"), "input_embeds": ("batch", "tokens")}
BUCKETS = [(1, 1), (4, 1), (8, 4)]


class Attention(torch.nn.Module):
    """Attention of new tokens to a cache that stays where it is, by hand: the compiler finds it."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, HIDDEN)
        self.project = torch.nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("keys", torch.randn(1, HEADS, CACHE, HIDDEN // HEADS))
        self.register_buffer("values", torch.randn(1, HEADS, CACHE, HIDDEN // HEADS))

    def forward(self, input_ids, position_ids, input_embeds):
        hidden = self.embed(input_ids) + input_embeds
        query = self.project(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mask = torch.arange(CACHE, device=query.device) <= position_ids[:, None, :, None]
        scores = query @ self.keys.transpose(2, 3) * (HIDDEN // HEADS) ** -0.5
        out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ self.values
        return {"hidden": out.transpose(1, 2).flatten(2), "tokens": (input_ids + position_ids,)}


def inputs_of(batch, tokens, seed=0):
    torch.manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 50, (batch, tokens), device="cuda"),
        "position_ids": torch.randint(0, CACHE, (batch, tokens), device="cuda"),
        "input_embeds": torch.randn(batch, tokens, HIDDEN, device="cuda"),
    }


def runner_of(fn, **settings):
    return GraphRunner(fn, **({"buckets": BUCKETS, "dims": DIMS, "output_dims": ("batch", "tokens")} | settings))


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Attention().cuda().eval()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@torch.no_grad()
def test_every_size_equals_eager(model, compiled):
    fn = torch.compile(model, backend="sgl_npu", options={"strict": True}) if compiled else model
    runner = runner_of(fn)
    sizes = [(8, 4), (1, 1), (3, 1), (4, 1), (5, 2), (2, 1), (8, 3), (1, 1)]
    calls = [inputs_of(*size, seed=seed) for seed, size in enumerate(sizes)]
    kept = [runner(**inputs) for inputs in calls]
    for found, inputs in zip(kept, calls, strict=True):
        assert_close(found, model(**inputs))
    assert (runner.statistics.captures, runner.statistics.replays) == (3, len(sizes))
    assert not runner.statistics.eager


@pytest.mark.parametrize("name", DIMS)
@torch.no_grad()
def test_a_new_value_of_each_input_arrives(model, name):
    runner = runner_of(torch.compile(model, backend="sgl_npu", options={"strict": True}))
    first, second = inputs_of(3, 1, seed=1), inputs_of(3, 1, seed=2)
    runner(**first)
    changed = first | {name: second[name]}
    assert_close(runner(**changed), model(**changed))
    assert runner.statistics.captures == 1


@torch.no_grad()
def test_nan_of_a_larger_call_does_not_stay_in_the_padding():
    def mixed(input_ids, position_ids, input_embeds):
        return input_embeds.sum((0, 1), keepdim=True).repeat(*input_ids.shape, 1)

    runner = runner_of(mixed)
    large, small = inputs_of(8, 4), inputs_of(5, 2)
    runner(**(large | {"input_embeds": torch.full_like(large["input_embeds"], torch.nan)}))
    assert_close(runner(**small), mixed(**small))


@torch.no_grad()
def test_memory_is_reported_and_freed(model):
    runner = runner_of(model, max_graphs=3)
    runner.capture(**inputs_of(2, 1))
    memory = runner.memory()
    assert set(memory.buckets) == set(BUCKETS)
    assert memory.pool > 0
    assert all(size > 0 for size in memory.buckets.values())
    runner.clear()
    torch.cuda.empty_cache()
    # The allocator keeps a segment of 2 MiB (torch 2.11), and cuBLAS its workspace before torch 2.13.
    assert runner.memory().pool < memory.pool


@pytest.mark.filterwarnings("ignore:sgl_npu. GraphRunner has freed")
@torch.no_grad()
def test_evicted_graphs_are_captured_again(model):
    """With one graph at a time the pool loses its last graph at every capture."""
    runner = runner_of(model, max_graphs=1)
    for seed, size in enumerate([(1, 1), (4, 1), (8, 4), (1, 1)]):
        inputs = inputs_of(*size, seed=seed)
        assert_close(runner(**inputs), model(**inputs))
    assert (runner.statistics.captures, runner.statistics.evictions) == (4, 3)


@pytest.mark.filterwarnings("ignore:sgl_npu. GraphRunner has freed")
@torch.no_grad()
def test_a_graph_outlives_another_whose_memory_becomes_that_of_other_tensors(model):
    """Its cuBLAS workspace is freed with the other (torch 2.13; pytorch#193402)."""
    runner = runner_of(model, max_graphs=2)
    kept = inputs_of(4, 1)
    for inputs in (inputs_of(1, 1), kept, inputs_of(8, 4)):  # the last is captured in place of the first
        runner(**inputs)
    torch.cuda.empty_cache()
    others = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(8)]
    assert_close(runner(**kept), model(**kept))
    assert all(x.isnan().all() for x in others)


@torch.no_grad()
def test_after_a_capture_that_failed_others_succeed(model):
    def reading(input_ids, position_ids, input_embeds):
        if input_ids.shape[0] == 4:
            input_ids.sum().item()
        return model(input_ids, position_ids, input_embeds)

    runner = runner_of(reading)
    one, three = inputs_of(1, 1), inputs_of(3, 1)
    assert_close(runner(**one), model(**one))
    stream = torch.cuda.current_stream()
    with pytest.raises(CaptureError, match=r"batch 4, tokens 1.*\.item\(\)"):
        runner(**three)
    assert torch.cuda.current_stream() == stream
    for inputs in (one, inputs_of(8, 4), inputs_of(7, 3)):
        assert_close(runner(**inputs), model(**inputs))


@torch.no_grad()
def test_autocast_weights_that_are_gone_are_not_read(model):
    runner = runner_of(model, output_dims={"hidden": ("batch", "tokens"), "tokens": ("batch", "tokens")})
    for seed in range(3):
        inputs = inputs_of(4, 1, seed)
        with torch.autocast("cuda", torch.bfloat16):
            expected, found = model(**inputs), runner(**inputs)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
        torch.cuda.empty_cache()
