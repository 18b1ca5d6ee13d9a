"""The target, a small decoder like Qwen3, whose layers the draft model is made of too.

Nothing here knows of sgl_npu. B sequences, S new tokens, P tokens behind them, L layers, C channels, V tokens.
Keys and values of past tokens are rows of a tensor (B, P, L, 2, KV heads, D), of one layer (B, P, 2, KV heads, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of both models. The target's channels after the layers `features` are what the draft model reads."""

    vocab: int = 65
    channels: int = 64
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    inner: int = 128
    layers: int = 6
    features: tuple[int, ...] = (1, 3, 5)
    draft_layers: int = 2
    block: int = 8

    @property
    def mask_token(self) -> int:
        """What a block that is to be drafted holds after its first token."""
        return self.vocab - 1


class Rotary(NamedTuple):
    """Cosines and sines (S, 1, D / 2) of the positions of S tokens, for all layers of a pass."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, positions: Tensor, like: Tensor, dim: int) -> Rotary:
        """Of positions (S,), in the dtype of `like`, for heads of `dim`, D."""
        frequencies = 10000.0 ** (torch.arange(dim // 2, device=positions.device, dtype=torch.float32) * (-2.0 / dim))
        angles = positions[:, None, None] * frequencies
        return cls(angles.cos().to(like.dtype), angles.sin().to(like.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """(B, S, heads, D) rotated, halves as in Llama."""
        first, second = x.chunk(2, -1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), -1)


class Attention(nn.Module):
    """New tokens attend to past ones and to each other, without a mask (S, P + S) to all of them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dim = config.dim
        self.query = nn.Linear(config.channels, config.heads * config.dim, bias=False)
        self.key = nn.Linear(config.channels, config.kv_heads * config.dim, bias=False)
        self.value = nn.Linear(config.channels, config.kv_heads * config.dim, bias=False)
        self.out = nn.Linear(config.heads * config.dim, config.channels, bias=False)
        self.query_norm, self.key_norm = nn.RMSNorm(config.dim, eps=1e-6), nn.RMSNorm(config.dim, eps=1e-6)

    def rows(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """(B, S, C) -> keys and values, (B, S, 2, KV heads, D)."""
        key, value = (project(hidden).unflatten(-1, (-1, self.dim)) for project in (self.key, self.value))
        return torch.stack((rotary(self.key_norm(key)), value), 2)

    def forward(
        self, hidden: Tensor, past: Tensor | None, rotary: Rotary, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, S, C), past rows of this layer -> (B, S, C), the rows of the new tokens."""
        rows = self.rows(hidden, rotary)
        query = rotary(self.query_norm(self.query(hidden).unflatten(-1, (-1, self.dim))))
        key, value = (rows if past is None else torch.cat((past, rows), 1)).unbind(2)
        found = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, enable_gqa=True
        )
        return self.out(found.transpose(1, 2).flatten(2)), rows


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm, self.inner_norm = (nn.RMSNorm(config.channels, eps=1e-6) for _ in range(2))
        self.gate, self.up = (nn.Linear(config.channels, config.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(config.inner, config.channels, bias=False)

    def forward(
        self, hidden: Tensor, past: Tensor | None, rotary: Rotary, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `Attention.forward`."""
        found, rows = self.attention(self.attention_norm(hidden), past, rotary, mask)
        hidden = hidden + found
        inner = self.inner_norm(hidden)
        return hidden + self.down(F.silu(self.gate(inner)) * self.up(inner)), rows


class Target(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.channels)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.channels, eps=1e-6)
        self.head = nn.Linear(config.channels, config.vocab, bias=False)

    def forward(self, tokens: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S) tokens, past rows -> logits (B, S, V), features (B, S, len(features) * C), new rows."""
        hidden, rows, features = self.embed(tokens), [], []
        positions = positions_behind(past, tokens.size(1), tokens.device)
        rotary = Rotary.of(positions, hidden, self.config.dim)
        mask = torch.arange(positions.size(0) + (0 if past is None else past.size(1)), device=tokens.device)
        mask = mask <= positions[:, None]  # causal from the bottom right
        for number, layer in enumerate(self.layers):
            hidden, new = layer(hidden, None if past is None else past[:, :, number], rotary, mask)
            rows.append(new)
            if number in self.config.features:
                features.append(hidden)
        return self.head(self.norm(hidden)), torch.cat(features, -1), torch.stack(rows, 2)


def positions_behind(past: Tensor | None, count: int, device: torch.device) -> Tensor:
    """The positions of `count` tokens behind past ones."""
    start = 0 if past is None else past.size(1)
    return torch.arange(start, start + count, device=device)
