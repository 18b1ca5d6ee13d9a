"""Layers close to what is fused before an attention: whatever is made of them, the answer is eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rotary_cases import HEAD_DIM, HIDDEN, angles, halves, neighbours
from torch import nn

import sgl_npu  # noqa: F401 (names the backend)

OPTIONS = {"platform": "npu", "inner": "eager", "strict": True}


def norm(x, weight=None):
    return F.rms_norm(x, x.shape[-1:], weight, eps=1e-5)


def same(x):
    return x


class Layer(nn.Module):
    """`query` is applied to query and key (B, S, N, D), `value` to the value, `rotate` behind the transposes."""

    def __init__(self, query=same, value=same, rotate=halves, columns=32, dtype=torch.float32):
        super().__init__()
        self.query, self.value, self.rotate = query, value, rotate
        self.linears = nn.ModuleList([nn.Linear(HIDDEN, size) for size in (64, 32, columns)]).to(dtype)

    def forward(self, x):
        query, key, value = (linear(x) for linear in self.linears)
        query, key = (self.query(y.unflatten(-1, (-1, HEAD_DIM))) for y in (query, key))
        value = self.value(value.unflatten(-1, (2, -1)))
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        angle = angles(torch.arange(x.shape[1]), HEAD_DIM)
        return F.scaled_dot_product_attention(
            self.rotate(query, angle), self.rotate(key, angle), value, enable_gqa=True
        )


def halves_normed(x):
    return torch.cat([norm(y) for y in x.chunk(2, -1)], -1)


def parities_normed(x):
    return torch.stack([norm(x[..., 0::2]), norm(x[..., 1::2])], -1).flatten(-2)


def grouped(x):
    return x.unflatten(2, (2, -1)).flatten(2, 3)


def on_a_grid(x, angle):
    return halves(x.unflatten(2, (3, 2)), angle[:3, None]).flatten(2, 3)


def of_two_tables(x, angle):
    """The second half of the channels is turned alike in all rows."""
    parts = neighbours(x[..., :8], angle[..., :4]), neighbours(x[..., 8:], angle[:1, 4:])
    return torch.cat(parts, -1)


def whole_numbers(x):
    return torch.empty(x.shape, dtype=torch.int32).copy_(x).float()


def root_of_whole_numbers(x):
    return x * torch.rsqrt(x.int().float().pow(2).mean(-1, keepdim=True) + 1e-5)


WEIGHT = torch.rand(HEAD_DIM)
LAYERS = {
    "values backwards": Layer(value=lambda v: v.flip(-1)),
    "every other value": Layer(value=lambda v: v.unflatten(-1, (16, 2)).unbind(-1)[1], columns=64),
    "values twice": Layer(value=lambda v: torch.cat([v[..., :8]] * 2, -1)),
    "values rolled": Layer(value=lambda v: v.roll(3, -1)),
    "norms of halves": Layer(query=halves_normed),
    "norms of parities": Layer(query=parities_normed),
    "a norm backwards": Layer(query=lambda x: norm(x.flip(-1), WEIGHT).flip(-1)),
    "a weight of pairs": Layer(query=lambda x: (norm(x).unflatten(-1, (2, 8)) * WEIGHT[:8]).flatten(-2)),
    "a squeeze that does nothing": Layer(rotate=lambda x, a: halves(x, a).squeeze(1)),
    "a squeeze before the rotation": Layer(query=lambda x: x.squeeze(2)),
    "a squeezed table": Layer(rotate=lambda x, a: halves(x, a.squeeze(0))),
    "values in 8 bits": Layer(value=lambda v: v.to(torch.float8_e4m3fn).float()),
    "queries in 16 bits": Layer(query=lambda x: x.bfloat16().float()),
    "values as whole numbers": Layer(value=whole_numbers),
    "a norm of whole numbers": Layer(query=root_of_whole_numbers),
    "heads in groups": Layer(query=grouped),
    "rows on a grid": Layer(rotate=on_a_grid),
    "tables of different sizes": Layer(rotate=of_two_tables),
    "a rotation in float32": Layer(
        rotate=lambda x, a: halves(x.float(), a), value=lambda v: v.float(), dtype=torch.half
    ),
    "float64": Layer(dtype=torch.float64, rotate=lambda x, a: halves(x, a.double())),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("batch", [2, 1])
def test_the_answer_is_eagers(case, batch):
    model = LAYERS[case].eval()
    x = torch.randn(batch, 6, HIDDEN, dtype=model.linears[0].weight.dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model, backend="sgl_npu", options=OPTIONS)(x)
    tolerance = {torch.half: 2e-3, torch.float64: 1e-5}.get(x.dtype, 1e-5)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_scaled_rotation_in_float32_of_a_narrow_projection():
    model = Layer(rotate=lambda x, a: halves(x.float(), a) * 0.5, value=lambda v: v.float(), dtype=torch.half).eval()
    x = torch.randn(2, 6, HIDDEN, dtype=torch.half)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="sgl_npu", options=OPTIONS)(x)
        torch.testing.assert_close(found, model(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_nothing_to_attend(shape):
    model = Layer(query=norm).eval()
    x = torch.randn(*shape, HIDDEN)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.compile(model, backend="sgl_npu", options=OPTIONS)(x).shape == model(x).shape
