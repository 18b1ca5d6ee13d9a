"""A model of three attentions that a page is made of."""

from __future__ import annotations

import torch
from torch import nn

SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 24, "size": 16}


class Attention(nn.Module):
    """Softmax between two products, with a causal mask of the module's own and the caller's padding."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        width = SIZES["heads"] * SIZES["size"]
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * SIZES["kv_heads"] * SIZES["size"])

    def forward(self, x, keep):
        batch, tokens, _ = x.shape
        query = self.q(x).view(batch, tokens, -1, SIZES["size"]).transpose(1, 2)
        key, value = (
            part.view(batch, tokens, -1, SIZES["size"]).transpose(1, 2).repeat_interleave(2, 1)
            for part in self.kv(x).chunk(2, -1)
        )
        i = torch.arange(tokens)
        mask = i[None] <= i[:, None]
        if self.window is not None:
            mask = mask & (i[None] > i[:, None] - self.window)
        mask = mask[None, None] & keep[:, None, None] if keep is not None else mask[None, None]
        scores = (query @ key.transpose(2, 3) / 4.0).masked_fill(~mask, float("-inf"))
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention(), Attention(window=6)])

    def forward(self, x, keep):
        for layer in self.layers[:2]:
            x = x + layer(x, keep)
        return x + self.layers[2](x, None)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and which of them are none of the padding: the first five of the second sample are."""
    torch.manual_seed(0)
    keep = torch.ones(SIZES["batch"], SIZES["tokens"], dtype=torch.bool)
    keep[1, :5] = False
    return torch.randn(SIZES["batch"], SIZES["tokens"], SIZES["heads"] * SIZES["size"]).bfloat16(), keep
