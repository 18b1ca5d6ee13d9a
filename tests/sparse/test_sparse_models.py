"""Whole models that know nothing of sparse attention: which of their attentions become sparse, and what they give."""

from __future__ import annotations

import pytest
import torch
from sequence.model_cases import CASES, Inputs
from sparse.sparse_cases import small_wan, wan_inputs

import sgl_npu

RAIN = "rain_fusion_attn"
# Attentions of each model, and how many of them are over the video alone, or over it and the text, without a mask.
MODELS = {"Wan": (4, 2), "CogVideoX": (2, 2), "SD3": (2, 2), "Flux": (2, 0)}


def compiled(model, attention=RAIN, dynamic=None, inner="eager", **config):
    torch._dynamo.reset()
    options = {"attention": attention, "attention_config": config, "inner": inner, "strict": True}
    return torch.compile(model, backend="sgl_npu", options=options, fullgraph=True, dynamic=dynamic)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_attention_over_the_video_becomes_sparse(name):
    case = CASES[name]
    model, inputs, before = case.build(), case.inputs(Inputs(*case.sizes[0], batch=3)), len(sgl_npu.reports())
    found, expected = compiled(model, sparsity=0.01)(**inputs), model(**inputs)
    (report,) = sgl_npu.reports()[before:]
    sparse = [site for site in report.sites if site.kernel == RAIN]
    assert (len(report.sites), len(sparse)) == MODELS[name]
    assert all(site.refusals[0][0] == RAIN for site in report.sites if site not in sparse)
    # So short a sequence has one block, which is always kept.
    assert torch.allclose(found[0], expected[0], atol=1e-5)


def test_a_graph_that_is_differentiated_stays_dense():
    model = small_wan(layers=1)
    report = sgl_npu.explain(model, options={"attention": RAIN, "strict": True}, **wan_inputs(3, 8, 8))
    clause = "the graph is differentiated: sparse kernels have no backward"
    assert [site.refusals[0] for site in report.sites] == [(RAIN, clause)] * 2


@torch.no_grad()
@pytest.mark.slow
def test_flux_is_refused_with_both_ways_to_name_its_grid():
    case = CASES["Flux"]
    report = sgl_npu.explain(case.build(), options={"attention": RAIN}, **case.inputs(Inputs(*case.sizes[0])))
    (reason,) = {clause for site in report.sites for kernel, clause in site.refusals if kernel == RAIN}
    assert "latent_shape" in reason and "patch_size" in reason


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("attention", [RAIN, "block_sparse_attn"])
def test_one_graph_serves_every_grid(attention):
    """Grids that 8 does not divide among them, against graphs of one grid each."""
    model, before = small_wan(layers=1), len(sgl_npu.reports())
    run = compiled(model, attention, dynamic=True, sparsity=0.6)
    sizes = [(3, 12, 20), (4, 11, 13), (5, 16, 9), (3, 17, 19)]
    found = [run(**wan_inputs(*size))[0] for size in sizes]
    (report,) = sgl_npu.reports()[before:]
    assert report.sites[0].kernel == attention
    for size, out in zip(sizes, found, strict=True):
        alone = compiled(model, attention, sparsity=0.6, latent_shape=size)(**wan_inputs(*size))[0]
        assert torch.allclose(out, alone, atol=1e-5)
        assert not torch.allclose(out, model(**wan_inputs(*size))[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_gives_what_the_graph_gives_op_by_op(dynamic):
    model = small_wan(layers=1)
    inputs = wan_inputs(4, 11, 13, batch=2)
    expected = compiled(model, sparsity=0.6)(**inputs)[0]
    before = len(sgl_npu.reports())
    found = compiled(model, inner="inductor", dynamic=dynamic, sparsity=0.6)(**inputs)[0]
    assert sgl_npu.reports()[before].sites[0].op == "flex_attention"
    assert torch.allclose(found, expected, atol=1e-5)
