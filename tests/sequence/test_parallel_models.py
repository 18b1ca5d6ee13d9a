"""Unmodified models with their sequence on several ranks: same answers, and the collectives that were promised."""

from __future__ import annotations

import pytest
import torch
from sequence import parallel_workers
from sequence.model_cases import CASES

pytestmark = pytest.mark.slow

SCHEMES = {"ulysses": {"ulysses": 2}, "ring": {"ring": 2}, "kv_gather": {"kv_gather": 2}}
# Causal, self and cross, joint with a text of its own: a model of each kind has every scheme, the others have one.
ON_TWO = [(name, scheme) for name in ("Llama", "Wan", "HunyuanVideo") for scheme in SCHEMES] + [
    ("Qwen3-MoE", "ring"),
    ("BERT", "kv_gather"),
    ("Flux", "ring"),
    ("SD3", "ulysses"),
    ("QwenImage", "kv_gather"),
    ("CogVideoX", "ulysses"),
]
ON_FOUR = [
    ("Llama", {"kv_gather": 2, "ulysses": 2}),
    ("BERT", {"ulysses": 4}),
    ("Wan", {"ulysses": 2, "ring": 2}),
    ("HunyuanVideo", {"ring": 4}),
    ("QwenImage", {"degree": 4}),
]


def shared(name: str) -> int:
    """The attentions whose keys are spread: cross attention is local, and a short prompt's own is not spread."""
    return sum(count for kind, count in CASES[name].sites.items() if kind in ("causal", "self", "joint"))


def expected_collectives(name: str, parallel: dict[str, int]) -> dict[str, int]:
    """Ulysses 2, KV-gather 1, ring R - 1 per attention, and one gather of the output."""
    count, found = shared(name), {"all_gather_into_tensor": 1}
    if parallel.get("ulysses", 1) > 1:
        found["all_to_all_single"] = 2 * count
    if parallel.get("ring", 1) > 1:
        found["ring_shift"] = (parallel["ring"] - 1) * count
    found["all_gather_into_tensor"] += count * (parallel.get("kv_gather", 1) > 1)
    return found


def test_every_model_is_spread():
    assert {name for name, _ in ON_TWO} == {name for name in CASES if "cache" not in name}


@pytest.mark.parametrize("name, scheme", ON_TWO)
def test_a_model_on_two_ranks_gives_what_it_gives_on_one(ranks, name, scheme):
    size = CASES[name].sizes[1]
    first, second = ranks(2).run(parallel_workers.model, name, SCHEMES[scheme], [size])
    assert max(first.errors) <= 1e-5
    assert first.graph == second.graph
    assert first.collectives == expected_collectives(name, SCHEMES[scheme])
    assert first.schemes.count(scheme) == shared(name)


@pytest.mark.parametrize("name, grid", ON_FOUR)
def test_a_model_on_four_ranks_gives_what_it_gives_on_one(ranks, name, grid):
    results = ranks(4).run(parallel_workers.model, name, grid, [CASES[name].sizes[-1]])
    assert max(max(result.errors) for result in results) <= 1e-5
    assert len({result.graph for result in results}) == 1
    if "degree" not in grid:
        assert results[0].collectives == expected_collectives(name, grid)


@pytest.mark.parametrize(
    "name, parallel", [("Llama", {"ring": 2}), ("Flux", {"ulysses": 2}), ("BERT", {"kv_gather": 2})]
)
def test_one_graph_serves_every_length(ranks, name, parallel):
    results = ranks(2).run(parallel_workers.model, name, parallel, CASES[name].sizes[:4], dynamic=True)
    assert max(max(result.errors) for result in results) <= 1e-5
    assert [result.graphs for result in results] == [1, 1]


@pytest.mark.parametrize("name, parallel", [("Llama", {"ring": 2}), ("Wan", {"ulysses": 2}), ("SD3", {"kv_gather": 2})])
def test_bfloat16_with_inductor(ranks, name, parallel):
    size = CASES[name].sizes[0]
    results = ranks(2).run(parallel_workers.model, name, parallel, [size], torch.bfloat16, "inductor", 2)
    assert max(max(result.errors) for result in results) <= 2e-2


@pytest.mark.parametrize("name, parallel, merges", [("Llama", {"ring": 2}, 2), ("Wan", {"ulysses": 2}, 0)])
def test_the_graph_that_an_npu_would_get_runs_on_emulated_ops(ranks, name, parallel, merges):
    sizes = [CASES[name].sizes[0], CASES[name].sizes[2]]
    results = ranks(2).run(parallel_workers.model, name, parallel, sizes, torch.bfloat16, platform="npu")
    assert max(max(result.errors) for result in results) <= 2e-2
    graph = results[0].graph
    assert graph == results[1].graph
    hops = parallel.get("ring", 1)
    local = CASES[name].attentions - shared(name)
    assert graph.count(" = npu.npu_fused_infer_attention_score(") == hops * shared(name) + local
    assert graph.count(" = npu.npu_attention_update(") == merges * shared(name)
    assert results[0].schemes.count(next(iter(parallel))) == shared(name)


@pytest.mark.parametrize(
    "name, parallel",
    [
        ("Llama, dynamic cache", {"ring": 2}),
        ("Llama, dynamic cache", {"kv_gather": 2}),
        ("Llama, static cache", {"ulysses": 2}),
        ("Llama, static cache", {"kv_gather": 2}),
    ],
)
def test_every_rank_has_the_whole_cache_after_a_prefill(ranks, name, parallel):
    results = ranks(2).run(parallel_workers.model, name, parallel, [(64, 0), (37, 0)])
    assert max(max(result.errors) for result in results) <= 1e-5


def test_kv_gather_writes_into_the_cache_what_it_gathered(ranks):
    result, _ = ranks(2).run(parallel_workers.model, "Llama, dynamic cache", {"kv_gather": 2}, [(64, 0)])
    # The first layer's keys are computed whole for the cache; the second's are gathered once; the logits.
    assert result.collectives == {"all_gather_into_tensor": 2}
