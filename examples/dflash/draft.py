"""The draft model: a whole block of tokens in one pass, from the channels of the target's layers.

As DFlash (arXiv:2602.06036) has it: embeddings and head are the target's; what the target knows of the tokens behind is
projected once and stands as keys and values before the block in every layer; the block, its first token and mask
tokens, attends to all of that and to all of itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dflash.model import Config, Layer, Rotary, Target, positions_behind


class Draft(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.fuse = nn.Linear(len(config.features) * config.channels, config.channels, bias=False)
        self.fuse_norm, self.norm = (nn.RMSNorm(config.channels, eps=1e-6) for _ in range(2))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.draft_layers))

    def read(self, features: Tensor, start: int) -> Tensor:
        """The target's features (B, S, ...), positions from `start` on -> rows (B, S, draft layers, 2, KV heads, D)."""
        context = self.fuse_norm(self.fuse(features))
        positions = torch.arange(start, start + features.size(1), device=features.device)
        rotary = Rotary.of(positions, context, self.config.dim)
        return torch.stack([layer.attention.rows(context, rotary) for layer in self.layers], 2)

    def forward(self, target: Target, first: Tensor, past: Tensor) -> Tensor:
        """First tokens of the blocks (B, 1), rows of all tokens before -> logits (B, block - 1, V) of the others."""
        hidden = target.embed(F.pad(first, (0, self.config.block - 1), value=self.config.mask_token))
        rotary = Rotary.of(positions_behind(past, self.config.block, first.device), hidden, self.config.dim)
        for number, layer in enumerate(self.layers):
            hidden, _ = layer(hidden, past[:, :, number], rotary, None)
        return target.head(self.norm(hidden[:, 1:]))
