"""Merged projections convert to GE: fewer operators, and the answer of weights that have changed."""

import merge_cases as cases
import pytest
import torch
from rotary_cases import HIDDEN
from stand_in import ge

OPTIONS = {"inner": "torchair", "inner_options": {"debug.run_eagerly": True}}
NORMS = pytest.mark.parametrize("norm", ["llama", "none"])


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    torch.manual_seed(0)
    cases.install_kernel(monkeypatch)


@NORMS
def test_the_answer_is_that_of_the_weights_as_they_are(norm):
    with ge.converted() as graphs:
        cases.check_changes(norm, OPTIONS)
    assert len(graphs) == 1


def operators(model, merge):
    torch._dynamo.reset()
    run = torch.compile(model, backend="sgl_npu", dynamic=True, options=OPTIONS | {"merge_projections": merge})
    with torch.no_grad(), ge.converted() as graphs:
        run(torch.randn(2, 9, HIDDEN, device="npu"), torch.arange(9, device="npu"))
    (graph,) = graphs
    return ge.ops(graph)


@NORMS
def test_each_layer_has_one_product_in_place_of_three_and_no_copy_of_what_they_give(norm):
    model = cases.Layers(norm).eval().to("npu")
    joined, merged = operators(model, False), operators(model, True)
    layers = len(model.layers)
    saved = {name: joined[name] - merged[name] for name in joined}
    assert (saved["MatMulV2"], saved["ConcatV2"]) == (2 * layers, layers)
    assert min(saved.values()) == 0 and merged.keys() <= joined.keys()
