"""`explain` finds out what a call would compile to, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import sgl_npu


class Attention(nn.Module):
    def __init__(self, break_graph: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros(()))
        self.break_graph = break_graph

    def forward(self, x, cache=None):
        self.calls.add_(1)
        heads = self.project(x).unflatten(-1, (4, 8)).transpose(1, 2)
        if self.break_graph:
            torch._dynamo.graph_break()
        if cache is not None:
            cache.copy_(heads)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(**options) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).transpose(1, 2).flatten(2)
        return x


@pytest.fixture
def x():
    return torch.randn(2, 16, 32)


def test_every_attention_is_a_site_with_its_module(x):
    report = sgl_npu.explain(Model(), x)
    assert [site.module for site in report.sites] == ["layers.0", "layers.1"]
    assert [site.mask for site in report.sites] == ["causal", "causal"]
    sgl_npu.expect(report, graphs=1)


def test_a_plain_function_is_explained(x):
    def attend(q, *, causal):
        return F.scaled_dot_product_attention(q, q, q, is_causal=causal)

    assert [site.mask for site in sgl_npu.explain(attend, x, causal=True).sites] == ["causal"]


def test_graphs_behind_graph_breaks_are_reported_in_order(x):
    def attend_twice(q):
        q = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q)

    report = sgl_npu.explain(attend_twice, x)
    assert [(site.id, site.mask) for site in report.sites] == [(0, "causal"), (1, "full")]
    with pytest.raises(sgl_npu.CoverageError, match="reached 2 graphs, at most 1 were expected"):
        sgl_npu.expect(report, graphs=1)


def test_an_npu_is_explained_on_cpu_tensors():
    report = sgl_npu.explain(Model().bfloat16().eval(), torch.randn(2, 16, 32).bfloat16(), options={"platform": "npu"})
    assert (report.platform, report.inner) == ("npu", "eager")
    assert all(site.op.startswith("npu.") for site in report.sites)


def test_the_inner_compiler_the_options_name_is_used(x):
    assert sgl_npu.explain(Model().eval(), x, options={"inner": "inductor"}).inner == "inductor"


def test_the_grad_mode_is_the_caller_s(x):
    assert {graph.kind for graph in sgl_npu.explain(Model(), x).graphs} == {"forward", "backward"}
    with torch.no_grad():
        assert [graph.kind for graph in sgl_npu.explain(Model(), x).graphs] == ["inference"]


def test_bad_options_are_refused_before_anything_runs(x):
    with pytest.raises(sgl_npu.OptionsError, match="unknown option 'platfrom': did you mean 'platform'"):
        sgl_npu.explain(lambda _: pytest.fail("the model ran"), x, options={"platfrom": "npu"})


def test_options_that_do_not_suit_the_tensors_are_an_options_error(x):
    with pytest.raises(sgl_npu.OptionsError, match="platform = 'cuda', but the inputs are on 'cpu'"):
        sgl_npu.explain(Model(), x, options={"platform": "cuda"})


def test_a_disabled_model_reaches_no_graph(x):
    report = sgl_npu.explain(torch.compiler.disable(Model()), x)
    assert not report.graphs
    assert "no graph reached the backend" in str(report)


def test_arguments_buffers_and_random_state_are_left_alone(x):
    model, cache, before = Attention(), torch.zeros(2, 4, 16, 8), len(sgl_npu.reports())
    state, calls = torch.get_rng_state(), model.calls
    sgl_npu.explain(model, x, cache=cache)
    sgl_npu.explain(lambda x: F.dropout(x, 0.5), x)
    assert cache.eq(0).all()
    assert model.calls is calls and calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert len(sgl_npu.reports()) == before


def test_arguments_that_cannot_be_copied_are_used_with_a_warning(x):
    with pytest.warns(UserWarning, match="cannot be copied"):
        report = sgl_npu.explain(Model(), x.requires_grad_() * 2)
    assert len(report.sites) == 2


@pytest.mark.parametrize("break_graph", [False, True])
def test_a_model_is_explained_five_times_alike(x, break_graph):
    model = Model(break_graph=break_graph).eval()
    found = [sgl_npu.explain(model, x) for _ in range(5)]
    assert len({report.graph for report in found}) == 1


def test_other_lengths_are_explained_with_their_own_sizes():
    model = Model().eval()
    assert [sgl_npu.explain(model, torch.randn(2, n, 32)).sites[0].query[2] for n in (8, 9, 10)] == [
        "8",
        "9",
        "10",
    ]


@pytest.mark.parametrize("break_graph", [False, True])
def test_a_compiled_model_stays_compiled_and_can_recompile(x, break_graph):
    model, compiled_graphs = Model(break_graph=break_graph).eval(), []

    def count(gm, inputs):
        compiled_graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=count, dynamic=False)
    compiled(x)
    before = len(compiled_graphs)
    for _ in range(10):
        sgl_npu.explain(model, x)
    compiled(x)
    assert len(compiled_graphs) == before
    compiled(torch.randn(2, 8, 32))
    assert len(compiled_graphs) == 2 * before


def test_a_model_without_memory_is_explained_for_an_npu():
    with FakeTensorMode():
        report = sgl_npu.explain(Model(), torch.randn(2, 16, 32), options={"platform": "npu"})
    sgl_npu.expect(report, ops={"npu.npu_fusion_attention_v3": 2})


@pytest.mark.parametrize("model", [None, "llama"])
def test_what_cannot_be_called_is_one_clear_error(model):
    with pytest.raises(TypeError, match="cannot be called; pass an"):
        sgl_npu.explain(model, torch.zeros(1))
