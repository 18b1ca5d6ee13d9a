"""What tests of the backend compile, how they compare, and how they count graphs."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sgl_npu

sdpa = F.scaled_dot_product_attention
INNERS = pytest.mark.parametrize("inner", ["eager", "inductor"])


def compiled(function, inner="eager", **arguments):
    return torch.compile(function, backend="sgl_npu", options={"inner": inner}, **arguments)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, check_stride=True)


class Attention(nn.Module):
    """A small causal self-attention with a buffer."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("gain", torch.full((dim,), 1.5))

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)) * self.gain


class count_reports:
    """How many graphs were compiled in its body: `len`, and the reports themselves."""

    def __enter__(self):
        self.start = len(sgl_npu.reports())
        return self

    def __exit__(self, *_):
        self.new = sgl_npu.reports()[self.start :]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
