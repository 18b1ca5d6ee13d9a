"""Dense in the first steps and for short sequences, sparse otherwise: two forms of one graph, compiled once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sparse.sparse_cases import small_wan, wan_inputs
from torch import nn

import sgl_npu
from sgl_npu.integrations.diffusers import DenoisingSteps
from sgl_npu.runtime.denoising import announce_step, current_step

GRID = (4, 16, 16)
RAIN = {"attention": "rain_fusion_attn", "inner": "eager", "strict": True}


class Block(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, heads: int = 2, dim: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.project = nn.Linear(32, 3 * heads * dim)

    def forward(self, x):
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def compiled_wan(**config):
    torch._dynamo.reset()
    model = small_wan(layers=1)
    config = {"sparsity": 0.8, "latent_shape": GRID, **config}
    return model, torch.compile(model, backend="sgl_npu", options={**RAIN, "attention_config": config}, fullgraph=True)


@torch.no_grad()
def test_first_steps_are_dense_and_the_rest_sparse_without_compiling_again():
    model, compiled = compiled_wan(skip_first_steps=2)
    inputs, before = wan_inputs(*GRID), len(sgl_npu.reports())
    dense = model(**inputs)[0]
    found = []
    for step in range(4):
        with sgl_npu.denoising_step(step):
            found.append(compiled(**inputs)[0])
    assert [torch.allclose(x, dense, atol=1e-5) for x in found] == [True, True, False, False]
    assert torch.equal(found[2], found[3])
    (report,) = sgl_npu.reports()[before:]
    assert [graph.kind for graph in report.graphs] == ["inference", "inference, dense"]
    assert [graph.text.count("sgl_npu.block_attention(") for graph in report.graphs] == [1, 0]
    assert report.sites[0].kernel == "rain_fusion_attn"
    assert report.sites[0].sparse.startswith("sparsity 0.8 over 4 x 16 x 16")


@torch.no_grad()
def test_without_skipped_steps_there_is_one_graph_and_no_step_is_needed():
    model, compiled = compiled_wan()
    inputs, before = wan_inputs(*GRID), len(sgl_npu.reports())
    assert not torch.allclose(compiled(**inputs)[0], model(**inputs)[0], atol=1e-5)
    (report,) = sgl_npu.reports()[before:]
    assert len(report.graphs) == 1


@torch.no_grad()
def test_an_unknown_step_is_dense_with_a_warning_that_says_how_to_announce_it():
    model, compiled = compiled_wan(skip_first_steps=2)
    inputs = wan_inputs(*GRID)
    with pytest.warns(UserWarning, match=r"no step was announced.*sgl_npu\.denoising_step\(i\).*DenoisingSteps"):
        assert torch.allclose(compiled(**inputs)[0], model(**inputs)[0], atol=1e-5)


def test_steps_nest_and_end():
    with sgl_npu.denoising_step(3):
        with sgl_npu.denoising_step(4):
            assert current_step() == 4
        assert current_step() == 3
    assert current_step() is None


@pytest.mark.parametrize("step", [-1, 1.0, True, None, "1"])
def test_what_is_no_step_is_refused(step):
    with pytest.raises(ValueError, match="a step is an int from 0 on"), sgl_npu.denoising_step(step):
        pass


def test_the_callback_of_a_pipeline_announces_the_next_step():
    announce_step(7)
    callback = DenoisingSteps()
    assert current_step() == 0
    assert callback(None, 0, None, {"latents": 1}) == {"latents": 1}
    assert current_step() == 1


def test_the_callback_passes_on_to_another():
    seen = []
    callback = DenoisingSteps(then=lambda *args: seen.append(args) or {"latents": 2})
    assert callback("pipe", 4, 900, {"latents": 1}) == {"latents": 2}
    assert seen == [("pipe", 4, 900, {"latents": 1})] and current_step() == 5


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
def test_laser_is_left_to_sequences_of_2048_tokens_in_one_graph(dynamic):
    torch._dynamo.reset()
    model, before = Block().to(torch.bfloat16), len(sgl_npu.reports())
    options = {"platform": "npu", "attention": "laser_attn", "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="sgl_npu", options=options, fullgraph=True, dynamic=dynamic)
    lengths = (2049, 2047, 2048, 2304, 300) if dynamic else (2049, 2047)
    for length in lengths:
        x = torch.randn(1, length, 32, dtype=torch.bfloat16)
        assert torch.allclose(compiled(x), model(x), atol=2e-2)
    reports = sgl_npu.reports()[before:]
    if dynamic:
        assert len(reports) == 1
        assert [graph.text.count("laser_attention(") for graph in reports[0].graphs] == [1, 0]
    else:
        assert [report.sites[0].kernel for report in reports] == ["laser_attn", "ascend_fa"]
        assert reports[1].sites[0].refusals[0] == ("laser_attn", "2047 tokens: under 2048 dense attention is faster")


@torch.no_grad()
def test_a_length_decides_which_of_the_two_graphs_runs(monkeypatch):
    from sgl_npu.runtime.npu import laser_attention

    torch._dynamo.reset()
    options = {"platform": "npu", "attention": "laser_attn", "inner": "eager", "strict": True}
    compiled = torch.compile(Block().half(), backend="sgl_npu", options=options, dynamic=True)
    compiled(torch.randn(1, 2500, 32).half())
    seen = []
    original = laser_attention._check
    monkeypatch.setattr(laser_attention, "_check", lambda q, *rest: seen.append(q.shape[2]) or original(q, *rest))
    for length in (2047, 2048, 2049):
        compiled(torch.randn(1, length, 32).half())
    assert seen == [2048, 2304]


class BlockWithBranch(Block):
    """A nested graph behind the attention."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,))


def test_graphs_nested_in_one_with_attention_do_not_hide_its_steps():
    torch._dynamo.reset()
    model, x = BlockWithBranch().eval(), torch.randn(1, 1024, 32)
    config = {"latent_shape": GRID, "sparsity": 0.8, "skip_first_steps": 2}
    run = torch.compile(model, backend="sgl_npu", options={**RAIN, "attention_config": config})
    with torch.no_grad():
        dense = model(x)
        for step in range(4):
            with sgl_npu.denoising_step(step):
                assert torch.allclose(run(x), dense, atol=1e-5) == (step < 2)
