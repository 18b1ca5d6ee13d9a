"""Attention once more, in float64 and position by position: what the kernels are held against."""

import torch

# From (B, N, S, D) to the axes of a layout; the packed ones join the batch along T.
ARRANGE = {
    "BNSD": lambda t: t,
    "BSND": lambda t: t.transpose(1, 2),
    "BSH": lambda t: t.transpose(1, 2).flatten(2),
    "SBH": lambda t: t.permute(2, 0, 1, 3).flatten(2),
    "NBSD": lambda t: t.transpose(0, 1),
    "NSD": lambda t: t[0],
    "TND": lambda t: t.transpose(1, 2).flatten(0, 1),
    "NTD": lambda t: t.transpose(0, 1).flatten(1, 2),
}


def arrange(tensor, axes):
    return ARRANGE[axes](tensor).contiguous()


def random_inputs(batch, heads, kv_heads, rows, keys, dim=32, dtype=torch.bfloat16, seed=0, value_dim=None):
    gen = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, rows, dim),
        (batch, kv_heads, keys, dim),
        (batch, kv_heads, keys, value_dim or dim),
    )
    return [torch.randn(shape, generator=gen).to(dtype) for shape in shapes]


def kept(mode, rows, keys, before=2**31 - 1, after=2**31 - 1):
    """(rows, keys) bool by the definition of the sparse modes, one position at a time."""
    shift = keys - rows
    rule = {
        0: lambda i, j: i - before <= j <= i + after,
        1: lambda i, j: True,
        2: lambda i, j: j <= i,
        3: lambda i, j: j <= i + shift,
        4: lambda i, j: i + shift - before <= j <= i + shift + after,
    }[mode]
    positions = [[rule(i, j) for j in range(keys)] for i in range(rows)]
    return torch.tensor(positions, dtype=torch.bool).view(rows, keys)


def formula(q, k, v, keep=None, scale=1.0, bias=None, sink=None):
    """Output and log-sum-exp of (B, N, S, D) inputs in float64; rows without a key give 0 and +inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = q.double() @ k.mT * scale
    if bias is not None:
        scores = scores + bias.double()
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    blank = total == 0
    if sink is not None:
        total = total + sink.double().exp().view(-1, 1, 1)
    out = (weights / total.masked_fill(blank, 1)) @ v
    return out, total.log().masked_fill(blank, torch.inf)


def assert_near(seen, expected):
    torch.testing.assert_close(seen.double(), expected.double(), rtol=2e-2, atol=2e-2, equal_nan=True)
