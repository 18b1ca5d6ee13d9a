"""Sizes that no graph knows, and tensors of their own for queries, keys and values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sgl_npu

GRID, LENGTH, HEADS = (2, 8, 16), 256, 2
METHODS = pytest.mark.parametrize("method", ["rain_fusion_attn", "block_sparse_attn"])
pytestmark = pytest.mark.filterwarnings("ignore:.*sparsity = 0.0 leaves nothing out")


class Separate(nn.Module):
    """A projection each, in float32."""

    def __init__(self, width=16, dim=32):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.ModuleList(nn.Linear(width, HEADS * dim) for _ in range(3))

    def forward(self, x):
        query, key, value = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.project)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def run(model, method, *given, sparsity=0.0, inner="eager", **options):
    """The answer, beside that of the model itself, and the record of its attention."""
    torch._dynamo.reset()
    config = {"latent_shape": GRID, "sparsity": sparsity}
    setting = {"attention": method, "attention_config": config, "inner": inner, "strict": True}
    before = len(sgl_npu.reports())
    with torch.no_grad():
        found = torch.compile(model, backend="sgl_npu", options=setting, fullgraph=True, **options)(*given)
        expected = model(*given)
    (report,) = sgl_npu.reports()[before:]
    (site,) = report.sites
    return found, expected, site


@METHODS
def test_a_head_size_that_is_a_symbol_stays_dense(method):
    def function(x, weights):
        query, key, value = ((x @ w).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in weights)
        return F.scaled_dot_product_attention(query, key, value)

    x, weights = torch.randn(1, LENGTH, 16), [torch.randn(16, HEADS * 32) for _ in range(3)]
    for w in weights:
        torch._dynamo.mark_dynamic(w, 1)
    found, expected, site = run(function, method, x, weights, sparsity=0.5)
    assert site.kernel != method and "is not one of 32, 64, 96, 128" in dict(site.refusals)[method]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@METHODS
@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_that_is_known_from_the_data_alone(method, count):
    """Each of its samples with blocks of its own, or dense."""
    model = Separate()

    def function(x, n):
        size = n.item()
        torch._check(size >= 1)
        torch._check(size <= x.size(0))
        return model(x.narrow(0, 0, size))

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found, expected, site = run(function, method, torch.randn(4, LENGTH, 16), torch.tensor(count))
    assert site.kernel == method or method in dict(site.refusals)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@METHODS
@pytest.mark.parametrize("dynamic", [False, None])
def test_projections_of_their_own_under_inductor(method, dynamic):
    """FlexAttention's C++ kernel reads sizes off the buffers that it gets, not off their views."""
    found, expected, site = run(Separate(), method, torch.randn(2, LENGTH, 16), inner="inductor", dynamic=dynamic)
    assert (site.kernel, site.op) == (method, "flex_attention")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    sparse, *_ = run(Separate(), method, torch.randn(2, LENGTH, 16), sparsity=0.9, inner="inductor", dynamic=dynamic)
    assert sparse.isfinite().all()
