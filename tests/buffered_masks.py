"""Modules that keep their mask in a buffer, and such masks."""

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, LONGEST = 32, 4, 64


class Attention(nn.Module):
    """nanoGPT's attention, its mask in a buffer."""

    def __init__(self, mask):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", mask)

    def masked(self, scores, mask):
        return scores.masked_fill(mask == 0, float("-inf"))

    def attend(self, q, k, v):
        rows, keys = q.size(2), k.size(2)
        mask = self.bias[..., keys - rows : keys, :keys]
        return F.softmax(self.masked((q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1))), mask), dim=-1) @ v

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, HEADS, -1).transpose(1, 2) for y in self.c_attn(x).split(width, dim=2))
        y = self.attend(q, k, v)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Chosen(Attention):
    """GPT-2's: where on a bool mask."""

    def masked(self, scores, mask):
        return torch.where(mask.bool(), scores, torch.full([], torch.finfo(scores.dtype).min))


class Added(Attention):
    """Whisper's and CLIP's: 0 and -inf, added."""

    def masked(self, scores, mask):
        return scores + mask


class Sdpa(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, self.bias[..., : q.size(2), : k.size(2)])


class Compared(Attention):
    """BERT's buffer: positions, compared."""

    def masked(self, scores, mask):
        positions = self.bias[:, : scores.size(-1)]
        return scores.masked_fill(positions[:, None, None, :] > positions[:, None, :, None], float("-inf"))


def tril(dtype=torch.float32, longest=LONGEST):
    return torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest).to(dtype)


def negative(longest=LONGEST):
    return torch.full((longest, longest), float("-inf")).triu(1)


def positions():
    return torch.arange(LONGEST).expand(1, -1)


def window():
    return tril().bool() & ~tril().bool().tril(-8)


def inputs(length=16):
    return torch.randn(2, length, WIDTH)


def one_wrong(mask):
    mask = mask.clone()
    mask[..., LONGEST - 1, 3] = 0
    return mask
