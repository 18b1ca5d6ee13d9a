"""Sparse attention through npugraph_ex: executed, the CPU's numbers, and which kernel is taken."""

import pytest
import sparse_models
import torch
from sparse.sparse_cases import small_wan, wan_inputs
from sparse_models import CASES, GRID, check_wan, check_widths, installed_package

import sgl_npu

EAGER = {"force_eager": True}
NAMES = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def package(monkeypatch):
    with installed_package(monkeypatch):
        yield


@NAMES
def test_a_video_transformer_gives_what_it_gives_on_the_cpu(package, name):
    check_wan(CASES[name], "npugraph_ex", EAGER)


@NAMES
def test_one_graph_serves_videos_of_every_width(package, name):
    report = check_widths(CASES[name], "npugraph_ex", EAGER)
    assert report.sites[0].op == CASES[name].op


def test_without_the_package_rain_fusion_is_torch_npu_s_kernel():
    torch._dynamo.reset()
    case = sparse_models.Case("rain_fusion_attn", "", "", {"sparsity": 0.6})
    run = sparse_models.compiled(
        small_wan(1).to("npu", torch.bfloat16), case, {"latent_shape": GRID}, inner_options=EAGER
    )
    inputs = wan_inputs(*GRID, dtype=torch.bfloat16)
    with torch.no_grad():
        run(**sparse_models.to_npu(inputs))
    assert [site.op for site in sgl_npu.reports()[-1].sites][::2] == ["npu.npu_block_sparse_attention"]


@pytest.mark.parametrize(
    ("attention", "config", "missing"),
    [
        ("rain_fusion_attn", {"kernel": "rain_fusion_attention"}, "rain_fusion_attention"),
        ("laser_attn", {}, "laser_attention"),
        ("block_sparse_attn", {}, "sparse_block_estimate"),
    ],
)
def test_a_kernel_of_the_package_that_is_not_there_is_one_error(attention, config, missing):
    torch._dynamo.reset()
    options = {"attention": attention, "attention_config": config, "inner_options": EAGER}
    run = torch.compile(torch.sin, backend="sgl_npu", options=options)
    with pytest.raises(sgl_npu.OptionsError, match=f"attention = '{attention}': {missing}: none of .* is there; "):
        run(torch.ones(3, device="npu"))


class WithoutBias(torch.nn.Module):
    """torch_npu keeps a product of such a projection whole."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.ModuleList(torch.nn.Linear(32, 64, bias=False) for _ in range(3))

    def forward(self, x):
        parts = (project(x).unflatten(-1, (2, 32)).transpose(1, 2) for project in self.project)
        return torch.nn.functional.scaled_dot_product_attention(*parts)


def test_projections_without_bias_are_projections():
    torch._dynamo.reset()
    case = sparse_models.Case("rain_fusion_attn", "", "", {"sparsity": 0.6})
    run = sparse_models.compiled(WithoutBias().half().to("npu"), case, {"latent_shape": (2, 8, 16)}, inner="eager")
    with torch.no_grad():
        run(torch.randn(2, 256, 32).half().to("npu"))
    report = sgl_npu.reports()[-1]
    assert report.sites[0].op == "npu.npu_block_sparse_attention" and "aten.matmul(" in report.graph
