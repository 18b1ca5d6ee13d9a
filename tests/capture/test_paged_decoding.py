"""A compiled step over a paged cache: padding leaves no trace, and every input arrives in every replay."""

from __future__ import annotations

import copy

import pytest
import torch
from capture.recording_driver import RecordingDriver
from torch import nn

import sgl_npu
from sgl_npu import GraphRunner, ops

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS, BATCH = 4, 2, 64, 16, 12, 4
TOLERANCE = 2e-2  # in bfloat16
KERNELS = {"cpu": "packed_reference", "npu": "ascend_packed"}
INPUTS = ("hidden", "slots", "table", "actual_seq_lengths", "actual_seq_lengths_kv")


class Layer(nn.Module):
    """The heads of (B, T, heads * DIM) hidden; no product of matrices, whose rounding may depend on the batch."""

    def __init__(self):
        super().__init__()
        for name in ("key_cache", "value_cache"):
            self.register_buffer(name, torch.randn(BLOCKS, BLOCK, KV_HEADS, DIM, dtype=torch.bfloat16))

    def forward(self, hidden, slots, table, actual_seq_lengths, actual_seq_lengths_kv):
        heads = hidden.flatten(0, 1).unflatten(-1, (-1, DIM)) * 2
        query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
        ops.update_kv_cache(self.key_cache, self.value_cache, key, value, slots.flatten())
        out = ops.attention(
            query,
            self.key_cache,
            self.value_cache,
            actual_seq_lengths=actual_seq_lengths,
            actual_seq_lengths_kv=actual_seq_lengths_kv,
            block_table=table,
            causal=True,
        )
        return out.unflatten(0, slots.shape)


@pytest.fixture(scope="module", params=KERNELS)
def step(request):
    """A layer, the same compiled for a platform, and the kernel of that."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, options = Layer(), {"platform": request.param, "inner": "eager", "strict": True}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield layer, torch.compile(layer, backend="sgl_npu", options=options, dynamic=True), KERNELS[request.param]


def runner_of(fn, tokens):
    return GraphRunner(
        fn,
        buckets=[(BATCH, tokens)],
        dims={
            "hidden": ("batch", "tokens"),
            "slots": ("batch", "tokens"),
            "table": ("batch",),
            "actual_seq_lengths_kv": ("batch",),
        },
        output_dims=("batch", "tokens"),
        pad={"slots": -1, "actual_seq_lengths_kv": tokens},
        driver=RecordingDriver("actual_seq_lengths", "actual_seq_lengths_kv"),
        warmup=1,
    )


def inputs_of(batch, tokens, seed):
    """The first `batch` of BATCH sequences whose blocks lie anywhere; cumulative lengths are those of the bucket."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, tokens, (HEADS + 2 * KV_HEADS) * DIM, generator=draw).bfloat16()
    table = torch.randperm(BLOCKS, generator=draw).view(BATCH, -1)
    ends = torch.randint(2 * tokens, table.size(1) * BLOCK, (BATCH, 1), generator=draw)
    positions = ends - tokens + torch.arange(tokens)
    slots = table.gather(1, positions // BLOCK) * BLOCK + positions % BLOCK
    queries = [tokens * (i + 1) for i in range(BATCH)]
    rows = (x[:batch] for x in (hidden, slots, table.int()))
    return dict(zip(INPUTS, (*rows, queries, ends[:batch].flatten().tolist()), strict=True))


@torch.no_grad()
def unpadded(fn, layer, inputs):
    """What `fn` gives without padding, and the caches after it; they are as before then."""
    before, queries = copy.deepcopy(layer.state_dict()), inputs["actual_seq_lengths"][: len(inputs["slots"])]
    found = fn(**inputs | {"actual_seq_lengths": queries}), layer.key_cache.clone(), layer.value_cache.clone()
    layer.load_state_dict(before)
    return found


@torch.no_grad()
def replayed(runner, layer, inputs):
    return runner(**inputs), layer.key_cache, layer.value_cache


def close(found, expected, tolerance=TOLERANCE):
    return all(torch.allclose(x, y, tolerance, tolerance) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 4])
def test_padding_changes_neither_outputs_nor_caches(step, tokens):
    """A row is the same to the bit beside padding as beside other sequences; caches are those of eager, to the bit."""
    layer, compiled, kernel = step
    runner = runner_of(compiled, tokens)
    for seed, batch in enumerate([4, 2, 3, 1, 4]):
        layer.key_cache.neg_()  # so that a key of an earlier call, written again by padding, is seen
        inputs = inputs_of(batch, tokens, seed)
        full, *_ = unpadded(compiled, layer, inputs_of(BATCH, tokens, seed))
        out, *caches = unpadded(layer, layer, inputs)
        found = replayed(runner, layer, inputs)
        assert close(found, (full[:batch], *caches), tolerance=0) and close(found[:1], [out])
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 5)
    assert sgl_npu.reports()[-1].sites[0].kernel == kernel


@pytest.mark.parametrize("name", INPUTS)
def test_a_new_value_of_each_input_arrives(step, name):
    layer, compiled, _ = step
    runner, first, second = runner_of(compiled, 2), inputs_of(3, 2, seed=1), inputs_of(3, 2, seed=2)
    second["actual_seq_lengths"] = [1, 3, 6, 8]
    changed = first | {name: second[name]}
    replayed(runner, layer, first)
    unchanged, expected = (unpadded(layer, layer, inputs) for inputs in (first, changed))
    assert not close(unchanged, expected)
    assert close(replayed(runner, layer, changed), expected)
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 2)
