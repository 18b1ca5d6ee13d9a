"""Causal or not, by proof: what a model's mask says of a block of new tokens over a cache is what the op is told."""

import pytest
import torch
import torch.nn.functional as F
from compiled_report import compile_for
from fused_calls import recorded

import sgl_npu

HEADS, KV_HEADS, DIM = 4, 2, 64
NONE = 2147483647


def keep(rows, keys, low, high, device=None):
    """Key j is kept by row i where low <= j - position(i) <= high; row i has position keys - rows + i."""
    position = torch.arange(keys - rows, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)[None]
    return (column - position <= high) & (column - position >= low)


MASKS = {
    "no mask": lambda rows, keys: None,
    "a mask of ones": lambda rows, keys: torch.ones(rows, keys, dtype=torch.bool),
    "positions, all of them": lambda rows, keys: torch.arange(keys)[None] <= torch.full((rows, 1), keys - 1),
    "tril": lambda rows, keys: torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows),
    "positions": lambda rows, keys: torch.arange(keys)[None] <= torch.arange(keys - rows, keys)[:, None],
    "rows of a square": lambda rows, keys: torch.ones(keys, keys, dtype=torch.bool).tril()[-rows:],
    "additive": lambda rows, keys: torch.full((rows, keys), float("-inf")).triu(keys - rows + 1),
    "window of 6": lambda rows, keys: keep(rows, keys, -5, 0),
    "window to both sides": lambda rows, keys: keep(rows, keys, -3, 2),
    "left side alone": lambda rows, keys: keep(rows, keys, -7, NONE),
}
# sparse_mode, pre_tokens, next_tokens
MODES = {name: (0, NONE, NONE) for name in ("no mask", "a mask of ones", "positions, all of them")}
MODES |= {name: (3, NONE, NONE) for name in ("tril", "positions", "rows of a square", "additive")}
MODES |= {"window of 6": (4, 5, 0), "window to both sides": (4, 3, 2), "left side alone": (4, 7, NONE)}


@pytest.fixture
def calls(monkeypatch):
    return recorded(monkeypatch)


def block(mask):
    """Attention of a block's tokens to a cache and to themselves, as decoders write it."""

    def run(query, new_key, new_value, past_key, past_value):
        key, value = torch.cat((past_key, new_key), 2), torch.cat((past_value, new_value), 2)
        found = mask(query.size(2), key.size(2))
        if found is not None and found.dtype != torch.bool:
            found = found.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, found, enable_gqa=True)

    return run


def tensors(rows, past):
    sizes = ((HEADS, rows), (KV_HEADS, rows), (KV_HEADS, rows), (KV_HEADS, past), (KV_HEADS, past))
    return [torch.randn(2, length, heads, DIM, dtype=torch.bfloat16).transpose(1, 2) for heads, length in sizes]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_call_says_what_the_mask_says(mask, dynamic, calls):
    torch.manual_seed(0)
    run = block(MASKS[mask])
    compiled = compile_for(run, dynamic=dynamic)
    shapes = [(4, 30), (5, 41), (16, 23)] if dynamic else [(5, 41)]
    for rows, past in shapes:
        given = tensors(rows, past)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*given), run(*given), atol=2e-2, rtol=2e-2)
    assert len(calls) == len(shapes), sgl_npu.reports()[-1].sites[0].refusals
    for (call, op_tensors), (rows, past) in zip(calls, shapes, strict=True):
        assert (call.sparse_mode, call.pre_tokens, call.next_tokens) == MODES[mask]
        assert (op_tensors.atten_mask is None) == (call.sparse_mode == 0)
        # Past and new tokens, each once, and no list of lengths that would say otherwise.
        assert (call.q.length, call.k.length) == (rows, past + rows)
        assert call.actual_seq_lengths is call.actual_seq_lengths_kv is None


def test_top_left_causal_over_a_cache_is_another_mask(calls):
    """is_causal of SDPA lets row i see the first i + 1 keys: mode 2, never mode 3."""

    def run(query, new_key, new_value, past_key, past_value):
        key, value = torch.cat((past_key, new_key), 2), torch.cat((past_value, new_value), 2)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    given = tensors(5, 9)
    with torch.no_grad():
        torch.testing.assert_close(compile_for(run)(*given), run(*given), atol=2e-2, rtol=2e-2)
    assert calls[0][0].sparse_mode == 2
