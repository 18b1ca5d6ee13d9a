"""Models whose sequence is spread over ranks, converted to GE whole: what communicates and what is fused."""

import pytest
from parallel_cases import COUNTS, DEGREES, cases, check, world
from stand_in import ge

LENGTHS = {False: (40,), True: (44, 51)}


@pytest.mark.parametrize(("model", "degrees", "dynamic"), cases())
def test_a_sharded_model_converts_with_the_collectives_of_its_scheme(model, degrees, dynamic):
    with world(DEGREES[degrees].ranks), ge.converted() as graphs:
        check(model, degrees, "torchair", {"debug.run_eagerly": True}, LENGTHS[dynamic])
    (graph,) = graphs
    ops, counts = ge.ops(graph), COUNTS[model][degrees]
    assert ops["HcomAllToAllV"] == 2 * counts.exchanges
    assert ops["HcomAllGather"] == 2 * counts.gathers + 1
    assert ops["FusedInferAttentionScore"] == 2 * counts.calls and ops["SoftmaxV2"] == 0
    assert ops["AttentionUpdate"] == 2 * counts.merges and ops["Exp"] == 0
