"""A step of decoding whose every input reaches every row of its output, and calls of it."""

from __future__ import annotations

import torch

from sgl_npu import GraphRunner

HIDDEN = 3
DIMS = {
    "input_ids": ("batch", "tokens"),
    "position_ids": ("batch", "tokens"),
    "input_embeds": ("batch", "tokens"),
    "mask": ("batch", "tokens"),
    "bias": (),
}
PAD = {"input_embeds": 0.5, "mask": True}


def decode(input_ids, position_ids, input_embeds, mask, bias, scale=1.0, extra=None):
    """(B, T) ids, positions and mask, (B, T, 3) embeddings, (3,) bias -> {"logits": (B, T, 3), "ids": (B, T)}."""
    hidden = input_embeds * scale + input_ids[..., None] + 100.0 * position_ids[..., None] + bias
    return {"logits": hidden.masked_fill(~mask[..., None], -1.0), "ids": input_ids + 1}


def inputs_of(batch=2, tokens=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 50, (batch, tokens), generator=draw),
        "position_ids": torch.randint(0, 50, (batch, tokens), generator=draw),
        "input_embeds": torch.randn(batch, tokens, HIDDEN, generator=draw),
        "mask": torch.rand(batch, tokens, generator=draw) > 0.3,
        "bias": torch.randn(HIDDEN, generator=draw),
    }


def runner_of(fn, driver, **settings):
    defaults = {"buckets": [(1, 1), (4, 1), (4, 8)], "dims": DIMS, "output_dims": ("batch", "tokens"), "pad": PAD}
    return GraphRunner(fn, driver=driver, **(defaults | settings))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
