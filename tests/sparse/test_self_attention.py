"""Equal lengths prove nothing: queries and keys must be projections of the same tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sgl_npu

GRID = (2, 8, 16)
LENGTH, WIDTH, HEADS = 256, 16, 2
REASON = "its queries and keys are not projections of the same tokens"


class Attention(nn.Module):
    """`tokens(x, y)` gives those of the queries and those of the keys, each a list that is projected and joined."""

    def __init__(self, tokens):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = tokens
        self.query, self.key, self.value = (nn.Linear(WIDTH, 32 * HEADS) for _ in range(3))
        self.norm = nn.RMSNorm(32)

    def forward(self, x, y):
        queries, keys = self.tokens(x, y)
        query, key, value = (
            torch.cat([project(part) for part in parts], 1).unflatten(-1, (HEADS, 32)).transpose(1, 2)
            for project, parts in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        return F.scaled_dot_product_attention(self.norm(query), self.norm(key) * 2.0, value)


SELF = {
    "the same tokens": lambda x, y: ([x], [x]),
    "the same after a view": lambda x, y: ([x], [x.view(2, LENGTH, WIDTH)]),
    "the same activations": lambda x, y: ([t := torch.sin(x)], [t]),
    "two sequences joined": lambda x, y: (parts := [x[:, :128], y[:, :128]], parts),
}
OTHER = {
    "other tokens": lambda x, y: ([x], [y]),
    "the same in another order": lambda x, y: ([x], [x.flip(1)]),
    "the same and others": lambda x, y: ([x], [x[:, :128], y[:, :128]]),
    "joined in another order": lambda x, y: ([x[:, :128], y[:, :128]], [y[:, :128], x[:, :128]]),
}


def kernel_of(model):
    options = {"attention": "rain_fusion_attn", "attention_config": {"latent_shape": GRID}, "strict": True}
    given = (torch.randn(2, LENGTH, WIDTH) for _ in range(2))
    with torch.no_grad():
        (site,) = sgl_npu.explain(model, *given, options=options).sites
    return site.kernel, site.refusals


@pytest.mark.parametrize("name", SELF)
def test_attention_of_tokens_to_themselves_is_found(name):
    assert kernel_of(Attention(SELF[name])) == ("rain_fusion_attn", [])


@pytest.mark.parametrize("name", OTHER)
def test_attention_to_other_tokens_stays_dense(name):
    kernel, refusals = kernel_of(Attention(OTHER[name]))
    assert kernel == "flash_cpu" and refusals == [("rain_fusion_attn", REASON)]


def test_what_is_no_projection_stays_dense():
    kernel, refusals = kernel_of(lambda x, y: F.scaled_dot_product_attention(*(x.view(2, LENGTH, 1, WIDTH).mT,) * 3))
    assert kernel == "flash_cpu" and refusals[0][0] == "rain_fusion_attn"
