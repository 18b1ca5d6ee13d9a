"""A serving step converts to GE: the cache's scatter, paging, lists of lengths."""

import hand_over_cases as cases
import pytest
import torch
from serving_cases import STEPS, check_documents, check_varlen
from stand_in import ge

EAGER = {"inner": "torchair", "inner_options": {"debug.run_eagerly": True}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", STEPS)
def test_one_graph_converts_and_gives_what_eager_gives_at_every_step(case):
    function, calls, kernel, _ = STEPS[case]
    with ge.converted() as graphs:
        (report,) = cases.check(function, calls, EAGER, dynamic=True)
    assert report.sites[0].kernel == kernel
    (graph,) = graphs
    (node,) = (op for op in graph.graph.op if op.type == "FusedInferAttentionScore")
    sources = {op.name: op.type for op in graph.graph.op}
    inputs = {desc.name: source.partition(":")[0] for desc, source in zip(node.input_desc, node.input, strict=True)}
    assert sources[inputs["actual_seq_lengths_kv"]] in ("Data", "Pack")
    assert bool(inputs["block_table"]) == (case != "packed prefill")


@pytest.mark.parametrize("case, copies", [("decode", 2), ("decode without padding", 0)])
def test_the_cache_is_written_in_place_where_no_slot_is_negative(case, copies):
    """GE writes in place what is read nowhere else, and padding may have to read a row."""
    function, calls, *_ = STEPS[case]
    with ge.converted() as graphs:
        cases.check(function, calls[:1], EAGER)
    found = ge.ops(graphs[0])
    assert (found["ScatterNdUpdate"], found["TensorMove"]) == (2, copies)


def test_varlen_attention_goes_through():
    """Its tensor of lengths is read before the graph runs."""
    (site,) = check_varlen(EAGER).sites
    assert (site.spelling, site.kernel) == ("varlen_attn", "ascend_packed"), site.refusals


def test_documents_that_position_ids_tell_go_through():
    """Two GE graphs for every length and number of documents: packed, and with the mask."""
    with ge.converted() as graphs:
        (report,) = check_documents(EAGER)
    assert report.sites[0].kernel == "ascend_packed"
    assert [ge.ops(graph)["FusedInferAttentionScore"] for graph in graphs] == [1, 1]


def test_layers_share_the_places_of_their_tokens():
    function, calls, *_ = STEPS["decode"]

    def two_layers(query, key, value, key_cache, value_cache, *rest):
        one = function(query, key, value, key_cache, value_cache, *rest)
        return one + function(query, key + 1, value, key_cache + 0, value_cache + 0, *rest)

    with ge.converted() as graphs:
        cases.check(two_layers, calls[:1], EAGER)
    found = ge.ops(graphs[0])
    assert (found["ScatterNdUpdate"], found["ArgMaxWithValue"], found["FloorMod"]) == (4, 1, 1)
