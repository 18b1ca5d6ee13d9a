"""Other ways to share a sequence: beside other parallelism, with inputs that are shards, attention alone, decoding."""

from __future__ import annotations

import pytest
from sequence import parallel_workers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["data", "tensor"])
def test_a_sequence_on_two_ranks_beside_other_parallelism_on_two(ranks, kind):
    parallel = {"ring": 2} if kind == "data" else {"ulysses": 2}
    assert max(ranks(4).run(parallel_workers.beside_other_parallelism, kind, parallel)) <= 1e-5


@pytest.mark.parametrize(
    "parallel",
    [
        {"ulysses": 2},
        {"ring": 2, "placement": "zigzag"},
        {"kv_gather": 2, "placement": "zigzag"},
    ],
    ids=str,
)
def test_inputs_that_are_shards_have_positions_of_the_whole_sequence(ranks, parallel):
    results = ranks(2).run(parallel_workers.shards_as_inputs, parallel, [32, 48])
    assert max(max(result.errors) for result in results) <= 1e-5
    assert results[0].graph == results[1].graph
    assert results[0].collectives.keys() != {"all_gather_into_tensor"} or "kv_gather" in parallel


def test_attention_alone_is_spread(ranks):
    results = ranks(2).run(parallel_workers.model, "Llama", {"ring": 2, "shard": "none"}, [(50, 0)])
    assert max(max(result.errors) for result in results) <= 1e-5
    # Every rank has all keys; what it gathers are the outputs of the two attentions.
    assert results[0].collectives == {"all_gather_into_tensor": 2}


@pytest.mark.parametrize("parallel", [{"ring": 2}, {"kv_gather": 2}], ids=str)
def test_each_rank_decodes_on_its_own_after_a_prefill_on_all(ranks, parallel):
    for errors in ranks(2).run(parallel_workers.prefill_then_decode, parallel):
        assert max(errors) <= 1e-5


@pytest.mark.parametrize("parallel", [{"ring": 2}, {"ulysses": 2}], ids=str)
@pytest.mark.parametrize(
    "name, shape", [("windows", (1, 24, 32)), ("windows", (2, 48, 32)), ("folded heads", (3, 31, 32))]
)
def test_small_modules_that_have_been_wrong(ranks, name, shape, parallel):
    for result in ranks(2).run(parallel_workers.small, name, parallel, shape):
        assert max(result.errors) <= 1e-5
        assert result.refused == ""


@pytest.mark.parametrize(
    "name, parallel, exchanged",
    [
        ("kept keys", {"kv_gather": 4}, {"all_gather_into_tensor": 3}),
        ("kept keys", {"kv_gather": 2, "ulysses": 2}, {"all_to_all_single": 2, "all_gather_into_tensor": 3}),
        ("kept keys, causal", {"kv_gather": 4}, {"all_gather_into_tensor": 3}),
        ("kept keys, causal", {"kv_gather": 2, "ulysses": 2}, {"all_to_all_single": 4, "all_gather_into_tensor": 4}),
    ],
    ids=str,
)
def test_attention_takes_keys_that_are_gathered_anyway_unless_that_is_more_work(ranks, name, parallel, exchanged):
    for result in ranks(4).run(parallel_workers.small, name, parallel, (2, 31, 32)):
        assert max(result.errors) <= 1e-5
        assert result.collectives == exchanged
