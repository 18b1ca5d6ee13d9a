"""Laser attention: exact on padded lengths and heads, and no overflow where float16 has not the range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse.sparse_cases import call_on, dense

from sgl_npu.lowering.sparse.laser import emit_laser, refuse_laser
from sgl_npu.lowering.sparse.token_grid import TokenGrid


def relative_error(call):
    found, expected = emit_laser(call), dense(call)
    assert found.dtype == call.query.dtype and found.shape == expected.shape and found.isfinite().all()
    return (found.double() - expected).abs().amax(-1) / expected.abs().max()


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("length", [255, 256, 257, 300])
def test_padding_takes_no_part(length, dim):
    call = call_on(TokenGrid(1, 1, length), torch.float16, heads=4, dim=dim)
    assert refuse_laser(call) is None
    assert relative_error(call).max() < 1e-3


@pytest.mark.parametrize("length", [2047, 2048, 2049])
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 1e-3), (torch.bfloat16, 5e-3), (torch.float32, 1e-3)])
def test_lengths_around_the_smallest(length, dtype, limit):
    assert relative_error(call_on(TokenGrid(1, 1, length), dtype, heads=2, kv_heads=1, dim=64)).max() < limit


def test_values_beyond_float16_are_scaled_exactly():
    call = call_on(TokenGrid(1, 1, 300), torch.bfloat16)
    factors = torch.tensor([1e6, 1e-3]).view(1, 2, 1, 1)
    call = replace(call, value=(call.value * factors).to(torch.bfloat16))
    error = (emit_laser(call).double() - dense(call)).abs().amax((0, 2, 3)) / dense(call).abs().amax((0, 2, 3))
    assert error.max() < 5e-3


def test_bfloat16_of_magnitude_1e4_does_not_overflow():
    call = call_on(TokenGrid(1, 1, 512), torch.bfloat16, dim=128)
    call = replace(call, query=call.query * 1e4, key=call.key * 1e4, value=call.value * 1e4)
    assert (
        relative_error(call) > 2e-2
    ).float().mean() < 0.02  # two keys nearly as high: float16 cannot tell them apart


def test_large_keys_and_small_queries_lose_nothing():
    call = call_on(TokenGrid(1, 1, 512), torch.bfloat16, dim=128)
    call = replace(call, query=call.query * 1e-5, key=call.key * 1e5)
    assert relative_error(call).max() < 5e-3


def test_kv_heads_must_divide_the_heads():
    call = call_on(TokenGrid(1, 1, 300), torch.float16, heads=4, kv_heads=3)
    assert refuse_laser(call) == "N = 4 is not a multiple of Nk = 3"
