"""Attention layers with rotary embeddings and norms as models write them: spellings, norms, layouts of projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 2, 16


def angles(positions: Tensor, size: int) -> Tensor:
    """(..., S, size / 2)."""
    inverse = 1.0 / 100 ** (torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size)
    return positions.float()[..., None] * inverse


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), -1)


def halves(x: Tensor, angle: Tensor) -> Tensor:
    whole = torch.cat((angle, angle), -1)
    cos, sin = whole.cos().to(x.dtype), whole.sin().to(x.dtype)
    return x * cos + _rotate_half(x) * sin


def halves_of_chunks(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def halves_of_a_roll(x: Tensor, angle: Tensor) -> Tensor:
    cos = torch.cat((angle, angle), -1).cos().to(x.dtype)
    sin = torch.cat((-angle.sin(), angle.sin()), -1).to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def halves_of_pairs(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -2).flatten(-2)


def neighbours(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = (y.repeat_interleave(2, -1).to(x.dtype) for y in (angle.cos(), angle.sin()))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def neighbours_unbound(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = (torch.stack((y, y), -1).flatten(-2) for y in (angle.cos(), angle.sin()))
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def neighbours_complex(x: Tensor, angle: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3).to(x.dtype)


def neighbours_written(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


ROTATIONS = {
    f.__name__: f
    for f in (
        halves, halves_of_chunks, halves_of_a_roll, halves_of_pairs,
        neighbours, neighbours_unbound, neighbours_complex, neighbours_written,
    )
}  # fmt: skip


class LlamaNorm(nn.Module):
    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset, self.eps = nn.Parameter(torch.randn(size)), offset, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (wide * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


class RootNorm(LlamaNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class PowerNorm(LlamaNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps) ** -0.5


NORMS = {
    "none": None,
    "llama": LlamaNorm,
    "gemma": lambda size: LlamaNorm(size, 1.0),
    "torch": lambda size: nn.RMSNorm(size, eps=1e-5),
    "root": RootNorm,
    "no weight": PowerNorm,
}


class Layer(nn.Module):
    """Self-attention of x (B, S, hidden) at positions (S,) or (B, S).

    `projection`: separate, packed (query, key and value side by side), alternating (head by head). `whole_norm`: the
    norm is over all heads at once. `heads_first`: what is rotated is (B, N, S, D), not (B, S, N, D).
    """

    def __init__(
        self,
        rotate=halves,
        norm: str = "none",
        projection: str = "separate",
        rotated: int = HEAD_DIM,
        whole_norm: bool = False,
        heads_first: bool = True,
        kv_heads: int = KV_HEADS,
        head_dim: int = HEAD_DIM,
    ) -> None:
        super().__init__()
        self.rotate, self.projection, self.rotated, self.whole_norm = rotate, projection, rotated, whole_norm
        self.heads_first, self.head_dim = heads_first, head_dim
        self.counts = (HEADS, kv_heads, kv_heads)
        sizes = [count * head_dim for count in self.counts]
        self.linears = nn.ModuleList(
            [nn.Linear(HIDDEN, size) for size in ([sum(sizes)], sizes)[projection == "separate"]]
        )
        make = NORMS[norm]
        self.norms = None
        if make is not None:
            self.norms = nn.ModuleList([make(size if whole_norm else head_dim) for size in sizes[:2]])

    def heads(self, x: Tensor) -> list[Tensor]:
        if self.projection == "alternating":
            return list(self.linears[0](x).unflatten(-1, (HEADS, -1)).chunk(3, -1))
        sizes = [count * self.head_dim for count in self.counts]
        parts = [f(x) for f in self.linears] if self.projection == "separate" else self.linears[0](x).split(sizes, -1)
        if self.norms is not None and self.whole_norm:
            parts = [*(norm(part) for norm, part in zip(self.norms, parts, strict=False)), parts[2]]
        return [part.unflatten(-1, (count, self.head_dim)) for part, count in zip(parts, self.counts, strict=True)]

    def turn(self, x: Tensor, angle: Tensor) -> Tensor:
        if self.rotated == self.head_dim:
            return self.rotate(x, angle)
        return torch.cat((self.rotate(x[..., : self.rotated], angle), x[..., self.rotated :]), -1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        if self.norms is not None and not self.whole_norm:
            query, key = (norm(part) for norm, part in zip(self.norms, (query, key), strict=True))
        angle = angles(positions, self.rotated)
        angle = angle.unsqueeze(-3 if self.heads_first else -2)
        if self.heads_first:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query, key = self.turn(query, angle), self.turn(key, angle)
        if not self.heads_first:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)
