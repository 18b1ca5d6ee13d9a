"""Random calls of the canonical op, and the float64 answer that every platform must give."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass

import torch
from compiled_report import ATTENTION, assert_same_strides, compile_for

from sgl_npu.runtime.attention import reference_attention

MANY = int(os.environ.get("SGL_NPU_FUZZ", "200")) * 3 // 10  # calls of each platform; `make nightly` asks for more
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-9}


@dataclass
class Call:
    """query, key, value, mask, bias, sinks of one call, and its settings."""

    tensors: list[torch.Tensor | None]
    settings: dict


def random_call(seed: int) -> Call:
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group = choose.choice([1, 2, 3]), choose.choice([1, 2, 3]), choose.choice([1, 2, 4])
    rows = choose.choice([1, 1, 2, 5, 17, 33])
    keys = choose.choice([1, 2, rows, rows, rows + 3, 33])
    dim = choose.choice([8, 16, 24, 64, 72, 128])
    value_dim = choose.choice([dim, dim, dim, 32])
    dtype = choose.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    full = (batch, kv_heads * group, rows, keys)

    def dense(*shape: int) -> torch.Tensor:
        order = choose.choice(["BNSD", "BSND", "BNDS", "part", "expanded"])
        b, n, s, d = shape
        if order == "BSND":
            return torch.randn((b, s, n, d), generator=generator).to(dtype).transpose(1, 2)
        if order == "BNDS":
            return torch.randn((b, n, d, s), generator=generator).to(dtype).transpose(2, 3)
        if order == "part":
            return torch.randn((b, n, s + 3, d + 5), generator=generator).to(dtype)[:, :, 1 : s + 1, 2 : d + 2]
        if order == "expanded":
            return torch.randn((1, 1, s, d), generator=generator).to(dtype).expand(shape)
        return torch.randn(shape, generator=generator).to(dtype)

    def broadcastable() -> tuple[int, ...]:
        shape = full[4 - choose.choice([1, 2, 3, 4, 4, 4]) :]
        return tuple(size if choose.random() < 0.6 else 1 for size in shape)

    tensors = [dense(*full[:3], dim), dense(batch, kv_heads, keys, dim), dense(batch, kv_heads, keys, value_dim)]
    mask = bias = sinks = None
    if choose.random() < 0.4:
        mask = torch.rand(broadcastable(), generator=generator) > choose.choice([0.3, 0.8])
    if choose.random() < 0.3:
        bias = torch.randn(broadcastable(), generator=generator).to(choose.choice([dtype, torch.float32]))
        if choose.random() < 0.5:
            bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) > 0.7, -math.inf)
    if choose.random() < 0.2:
        sinks = torch.randn(full[1], generator=generator).to(choose.choice([dtype, torch.bfloat16]))

    def side() -> int | None:
        near = [0, keys - rows, keys - rows, -1, 1, 3, -3, choose.randint(-rows - 1, keys + 1)]
        return choose.choice([None, None, *near])

    settings = {
        "scale": dim**-0.5,
        "softcap": choose.choice([0.0, 0.0, 0.0, 0.0, 5.0]),
        "lower": choose.choice([None, side()]),
        "upper": side(),
    }
    return Call([*tensors, mask, bias, sinks], settings)


def check_call(call: Call, platform: str, lse_used: bool, dynamic: bool, inner: str = "eager") -> None:
    """Compile the call alone: values as in float64, strides as of the canonical op."""

    def attention(*tensors):
        out, lse = ATTENTION(*tensors, **call.settings)
        return (out, lse) if lse_used else (out,)

    with torch.no_grad():
        eager = attention(*call.tensors)
        got = compile_for(attention, platform, inner, dynamic)(*call.tensors)
    exact = [x if x is None or x.dtype == torch.bool else x.double() for x in call.tensors]
    expected = reference_attention(*exact, **call.settings)[: 1 + lse_used]
    tolerance = TOLERANCES[call.tensors[0].dtype]
    for x, like, wanted in zip(got, eager, expected, strict=True):
        assert x.dtype == like.dtype
        torch.testing.assert_close(x.double(), wanted, atol=tolerance, rtol=tolerance)
        assert_same_strides(x, like)
