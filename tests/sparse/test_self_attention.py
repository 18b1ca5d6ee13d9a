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


def rows_of_batch(first, second):
    return lambda q, k, v: (q[first], k[second], v[second])


MOVED = {
    "shifted": lambda q, k, v: (q, k.roll(3, 2), v.roll(3, 2)),
    "reversed": lambda q, k, v: (q, k.flip(2), v.flip(2)),
    "picked": lambda q, k, v: (q, k[:, :, torch.arange(256).flip(0)], v),
    "of the other sample": lambda q, k, v: (q, k.roll(1, 0), v.roll(1, 0)),
    "one sample of the other": rows_of_batch(slice(0, 1), slice(1, 2)),
    "of the first sample": lambda q, k, v: (q, k[:1].expand_as(k), v[:1].expand_as(v)),
    "samples swapped": lambda q, k, v: (q, torch.cat([k[1:], k[:1]]), torch.cat([v[1:], v[:1]])),
    "an average": lambda q, k, v: (q, k.mean(0, keepdim=True).expand_as(k), v),
}


class Moved(nn.Module):
    """One projection of the tokens; what is done to queries and keys since."""

    def __init__(self, move):
        super().__init__()
        torch.manual_seed(0)
        self.move, self.project = move, nn.Linear(WIDTH, 3 * 32 * HEADS)

    def forward(self, x, y):
        parts = (part.unflatten(-1, (HEADS, 32)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(*self.move(*parts))


@pytest.mark.parametrize("name", MOVED)
def test_rows_that_were_moved_since_their_projection_stay_dense(name):
    assert kernel_of(Moved(MOVED[name])) == ("flash_cpu", [("rain_fusion_attn", REASON)])


def test_rows_that_were_not_moved_are_found():
    assert kernel_of(Moved(lambda q, k, v: (q * 2, k, v)))[0] == "rain_fusion_attn"


class TwoPictures(nn.Module):
    """Queries of one picture, keys of another, to both of which the same projection of a time is added."""

    def __init__(self):
        super().__init__()
        self.time, self.query, self.key = nn.Linear(8, 64), nn.Conv2d(4, 64, 1), nn.Conv2d(4, 64, 1)

    def forward(self, x, y, time):
        time = self.time(time)[:, :, None, None]
        query, key = self.query(x) + time, self.key(y) + time
        query, key = (z.flatten(2).transpose(1, 2).unflatten(-1, (2, 32)).transpose(1, 2) for z in (query, key))
        return F.scaled_dot_product_attention(query, key, key)


def test_what_is_added_to_both_makes_them_no_projections_of_the_same():
    options = {"attention": "rain_fusion_attn", "attention_config": {"latent_shape": (1, 16, 16)}, "strict": True}
    with torch.no_grad():
        given = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), torch.randn(1, 8)
        (site,) = sgl_npu.explain(TwoPictures(), *given, options=options).sites
    assert site.refusals == [("rain_fusion_attn", REASON)]


def test_what_is_no_projection_stays_dense():
    kernel, refusals = kernel_of(lambda x, y: F.scaled_dot_product_attention(*(x.view(2, LENGTH, 1, WIDTH).mT,) * 3))
    assert kernel == "flash_cpu" and refusals[0][0] == "rain_fusion_attn"
