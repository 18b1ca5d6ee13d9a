"""Blocks of plain PyTorch as people write them: whole modules, where the spelling is more than one formula."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn


class Projected(nn.Module):
    """Projections around a formula on (B, H, S, D), or on (B, S, H, D) with `heads_last`."""

    def __init__(self, formula, heads: int = 4, kv_heads: int | None = None, size: int = 16, heads_last: bool = False):
        super().__init__()
        kv_heads = kv_heads or heads
        self.formula, self.heads_last = formula, heads_last
        self.counts, self.size = (heads, kv_heads, kv_heads), size
        self.project = nn.ModuleList(nn.Linear(64, count * size) for count in self.counts)
        self.out = nn.Linear(heads * size, 64)

    def forward(self, x: Tensor, context: Tensor | None = None, **extra: Tensor) -> Tensor:
        sources = (x, x if context is None else context, x if context is None else context)
        parts = [
            layer(source).unflatten(-1, (count, self.size))
            for layer, source, count in zip(self.project, sources, self.counts, strict=True)
        ]
        if not self.heads_last:
            parts = [part.transpose(1, 2) for part in parts]
        out = self.formula(*parts, **extra)
        if not self.heads_last:
            out = out.transpose(1, 2)
        return self.out(out.flatten(2))


class NanoGPT(nn.Module):
    """karpathy/nanoGPT without flash: a registered lower triangle, cut to length."""

    def __init__(self, positions: int = 128):
        super().__init__()
        self.c_attn, self.c_proj, self.drop = nn.Linear(64, 192), nn.Linear(64, 64), nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(positions, positions)).view(1, 1, positions, positions))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = (
            part.view(batch, length, 4, width // 4).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = self.drop(F.softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class MinGPTConv(nn.Module):
    """The GPT-2 of OpenAI's code: -1e10 under the triangle, `w * b - 1e10 * (1 - b)`."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b s (h d) -> b h s d", h=4) for t in self.qkv(x).chunk(3, -1))
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        b = torch.tril(torch.ones(ns, ns, dtype=w.dtype, device=w.device))[ns - nd : ns, :ns].view(1, 1, nd, ns)
        w = w * b - 1e10 * (1 - b)
        return self.proj(rearrange(torch.matmul(F.softmax(w, dim=-1), v), "b h s d -> b s (h d)"))


class Lucidrains(nn.Module):
    """lucidrains/vit-pytorch: to_qkv, rearrange, attend, rearrange."""

    def __init__(self):
        super().__init__()
        self.norm, self.attend, self.dropout = nn.LayerNorm(64), nn.Softmax(dim=-1), nn.Dropout(0.1)
        self.to_qkv, self.to_out = nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=4) for t in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        dots = torch.matmul(q, k.transpose(-1, -2)) * 16**-0.5
        return self.to_out(rearrange(torch.matmul(self.dropout(self.attend(dots)), v), "b h n d -> b n (h d)"))


class LucidrainsPaLM(nn.Module):
    """lucidrains/PaLM-pytorch: one key and value head, einsum, causal by triu, max subtracted first."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_kv, self.to_out = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=4) * 16**-0.5
        k, v = self.to_kv(x).chunk(2, -1)
        sim = torch.einsum("b h i d, b j d -> b h i j", q, k)
        mask = torch.ones((x.shape[1], x.shape[1]), device=x.device, dtype=torch.bool).triu(1)
        sim = sim.masked_fill(mask, -torch.finfo(sim.dtype).max)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        out = torch.einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class XTransformers(nn.Module):
    """x-transformers: einsum, ALiBi bias, causal by index comparison, a key padding mask, talking to neither."""

    def __init__(self, cosine: bool = False, memories: int = 0):
        super().__init__()
        self.cosine = cosine
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.memory = nn.Parameter(torch.randn(2, 4, memories, 16)) if memories else None
        self.scale = nn.Parameter(torch.full((4, 1, 1), 2.0))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, 5.0).view(4, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=4) for t in (self.to_q(x), self.to_k(x), self.to_v(x)))
        if self.memory is not None:
            mem_k, mem_v = (repeat(m, "h n d -> b h n d", b=x.shape[0]) for m in self.memory)
            k, v = torch.cat((mem_k, k), dim=-2), torch.cat((mem_v, v), dim=-2)
        if self.cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        else:
            dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 16**-0.5
        i, j = dots.shape[-2:]
        rows, columns = torch.arange(j - i, j, device=x.device), torch.arange(j, device=x.device)
        if self.memory is None:
            dots = dots - (rearrange(columns, "j -> 1 1 j") - rearrange(rows, "i -> 1 i 1")).abs() * self.slopes
        if mask is not None:
            dots = dots.masked_fill(~rearrange(mask, "b j -> b 1 1 j"), -torch.finfo(dots.dtype).max)
        dots = dots.masked_fill(
            rearrange(rows, "i -> i 1") < rearrange(columns, "j -> 1 j"), -torch.finfo(dots.dtype).max
        )
        attn = F.softmax(dots, dim=-1, dtype=torch.float32).type(dots.dtype)
        return self.to_out(rearrange(torch.einsum("b h i j, b h j d -> b h i d", attn, v), "b h n d -> b n (h d)"))


class EinopsEinsum(nn.Module):
    """einops.einsum over named axes, heads in the middle."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b s h d", three=3, h=4)
        scores = einsum(q, k, "b i h d, b j h d -> b h i j") / 4.0
        return rearrange(einsum(scores.softmax(-1), v, "b h i j, b j h d -> b i h d"), "b s h d -> b s (h d)")


class T5Style(nn.Module):
    """T5: no scale, a relative position bias by buckets, weights cast back to the scores' type."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.relative_attention_bias = nn.Embedding(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, -1, 4, 16).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(3, 2))
        position = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        buckets = position.clamp(-16, 15) + 16
        scores += self.relative_attention_bias(buckets).permute([2, 0, 1]).unsqueeze(0)
        weights = F.dropout(F.softmax(scores.float(), dim=-1).type_as(scores), p=0.1, training=self.training)
        return self.o(torch.matmul(weights, v).transpose(1, 2).contiguous().view(batch, -1, 64))


class TransformerXL(nn.Module):
    """Transformer-XL: content and position terms, the position term shifted by a view."""

    def __init__(self):
        super().__init__()
        self.qkv, self.r, self.o = nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.u, self.v = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, 4, 16) for t in self.qkv(x).chunk(3, -1))
        r = self.r(positions).view(length, 4, 16)
        content = torch.einsum("bind,bjnd->bnij", q + self.u, k)
        shifted = torch.einsum("bind,jnd->bnij", q + self.v, r)
        padded = F.pad(shifted, (1, 0)).view(batch, 4, length + 1, length)
        shifted = padded[:, :, 1:].view_as(content)
        scores = (content + shifted) * 0.25
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1)[None, None], -1e30)
        return self.o(torch.einsum("bnij,bjnd->bind", F.softmax(scores, -1), v).reshape(batch, length, 64))


class TimmViT(nn.Module):
    """timm's Attention without its fused path: qkv reshaped to (3, B, H, N, D), unbind, q scaled first."""

    def __init__(self, qk_norm: bool = False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)
        self.q_norm, self.k_norm = (nn.LayerNorm(16) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        attn = (q * 16**-0.5) @ k.transpose(-2, -1)
        x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class TimmSwin(nn.Module):
    """timm's Swin block: windows, shifted, a table of relative biases, a mask per window."""

    def __init__(self, shift: int = 2, side: int = 8, window: int = 4):
        super().__init__()
        self.shift, self.side, self.window = shift, side, window
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, 4))
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", relative[..., 0] * (2 * window - 1) + relative[..., 1])
        regions = torch.zeros(side, side)
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for row, rows in enumerate(cuts):
            for column, columns in enumerate(cuts):
                regions[rows, columns] = 3 * row + column
        tiles = rearrange(regions, "(a w) (b v) -> (a b) (w v)", w=window, v=window)
        mask = tiles[:, None, :] - tiles[:, :, None]
        self.register_buffer("mask", mask.masked_fill(mask != 0, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        side, window, tokens = self.side, self.window, self.window**2
        grid = torch.roll(x.view(-1, side, side, 64), (-self.shift, -self.shift), (1, 2))
        tiles = rearrange(grid, "b (i w) (j v) c -> (b i j) (w v) c", w=window, v=window)
        q, k, v = self.qkv(tiles).reshape(-1, tokens, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * 0.25) @ k.transpose(-2, -1)
        attn = attn + self.table[self.index.view(-1)].view(tokens, tokens, 4).permute(2, 0, 1).unsqueeze(0)
        count = self.mask.shape[0]
        attn = attn.view(-1, count, 4, tokens, tokens) + self.mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, 4, tokens, tokens).softmax(dim=-1)
        out = self.proj((attn @ v).transpose(1, 2).reshape(-1, tokens, 64))
        out = rearrange(out, "(b i j) (w v) c -> b (i w) (j v) c", i=side // window, j=side // window, w=window)
        return torch.roll(out, (self.shift, self.shift), (1, 2)).flatten(1, 2)


class TimmLevit(nn.Module):
    """timm's LeViT: keys transposed by the reshape, biases gathered by index, value wider than key."""

    def __init__(self, tokens: int = 64):
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 4 * (8 + 8 + 32)), nn.Linear(128, 64)
        self.biases = nn.Parameter(torch.randn(4, tokens))
        self.register_buffer("index", (torch.arange(tokens)[:, None] - torch.arange(tokens)[None]).abs())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 4, -1).split([8, 8, 32], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        attn = (q @ k * 8**-0.5 + self.biases[:, self.index]).softmax(dim=-1)
        return self.proj(F.hardswish((attn @ v).transpose(1, 2).reshape(batch, length, 128)))


class TimmCait(nn.Module):
    """timm's CaiT class attention: the query is the first token alone."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(batch, 1, 4, 16).permute(0, 2, 1, 3) * 0.25
        k, v = (layer(x).reshape(batch, length, 4, 16).permute(0, 2, 1, 3) for layer in (self.k, self.v))
        attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(batch, 1, 64))


class TalkingHeads(nn.Module):
    """CaiT's trunk: scores and probabilities are mixed between heads. No kernel computes that."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj_l, self.proj_w = nn.Linear(64, 192), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * 0.25) @ k.transpose(-2, -1)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        attn = self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (attn @ v).transpose(1, 2).reshape(batch, length, 64)


class ConvAttention(nn.Module):
    """Self-attention over the pixels of a feature map by 1x1 convolutions, as in SAGAN, DDPM and VQGAN."""

    def __init__(self, heads: int | None = None):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Conv2d(64, 64, 1) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, width, rows, columns = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.heads:
            q, k, v = (t.reshape(batch * self.heads, -1, rows * columns) for t in (q, k, v))
            scale = 1 / math.sqrt(math.sqrt(width // self.heads))
            weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
            out = torch.einsum("bts,bcs->bct", torch.softmax(weight.float(), dim=-1).type(weight.dtype), v)
        else:
            q = q.reshape(batch, width, -1).permute(0, 2, 1)
            weight = torch.bmm(q, k.reshape(batch, width, -1)) * int(width) ** -0.5
            weight = F.softmax(weight, dim=2).permute(0, 2, 1)
            out = torch.bmm(v.reshape(batch, width, -1), weight)
        return x + self.out(out.reshape(batch, width, rows, columns))


class PoolByAttention(nn.Module):
    """Learned queries over tokens, as in Perceiver and Set Transformer."""

    def __init__(self, queries: int = 4):
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(1, queries, 64))
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.seeds).expand(x.shape[0], -1, -1)
        q, k, v = (torch.cat(t.split(16, 2), 0) for t in (q, self.k(x), self.v(x)))
        attn = torch.softmax(q.bmm(k.transpose(1, 2)) / math.sqrt(64), 2)
        return torch.cat(attn.bmm(v).split(x.size(0), 0), 2)


class FairseqMHA(nn.Module):
    """fairseq: time first, heads folded into the batch, a key padding mask through a 4-d view."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:
        length, batch, _ = x.shape
        q, k, v = (
            t.contiguous().view(length, batch * 4, 16).transpose(0, 1) for t in (self.q(x) * 0.25, self.k(x), self.v(x))
        )
        weights = torch.bmm(q, k.transpose(1, 2))
        weights = weights.view(batch, 4, length, length)
        weights = weights.masked_fill(key_padding_mask.unsqueeze(1).unsqueeze(2).to(torch.bool), float("-inf"))
        weights = F.softmax(weights.view(batch * 4, length, length), dim=-1, dtype=torch.float32).type_as(q)
        return self.o(torch.bmm(weights, v).transpose(0, 1).contiguous().view(length, batch, 64))


class LlamaReference(nn.Module):
    """meta-llama/llama's own code: complex rotary, repeat_kv, a triu mask added, softmax in float."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(64, n, bias=False) for n in (64, 32, 32, 64))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, -1, 16) for layer in (self.wq, self.wk, self.wv))
        angles = torch.outer(torch.arange(length), 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16)))
        freqs = torch.polar(torch.ones_like(angles), angles).view(1, length, 1, 8)
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2)) * freqs).flatten(3)
            for t in (q, k)
        )
        k, v = (t[:, :, :, None, :].expand(batch, length, 2, 2, 16).reshape(batch, length, 4, 16) for t in (k.to(v), v))
        q, k, v = q.to(v).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(16)
        scores = scores + torch.triu(torch.full((length, length), float("-inf")), diagonal=1).type_as(x)
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        return self.wo(torch.matmul(scores, v).transpose(1, 2).contiguous().view(batch, length, -1))


class AnnotatedTransformer(nn.Module):
    """The Annotated Transformer: `masked_fill(mask == 0, -1e9)`, one list of projections."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch = x.size(0)
        q, k, v = (layer(x).view(batch, -1, 4, 16).transpose(1, 2) for layer in self.linears[:3])
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        p_attn = self.dropout(scores.masked_fill(mask.unsqueeze(1) == 0, -1e9).softmax(dim=-1))
        x = torch.matmul(p_attn, v).transpose(1, 2).contiguous().view(batch, -1, 64)
        return self.linears[-1](x)


class ConformerRelative(nn.Module):
    """Shaw's relative keys, as in conformer repositories: a second product with a table of distances."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out, self.table = (
            nn.Linear(64, 64),
            nn.Linear(64, 128),
            nn.Linear(64, 64),
            nn.Embedding(65, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=4) for t in (self.q(x), *self.kv(x).chunk(2, dim=-1)))
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
        place = torch.arange(length)
        distance = (place[:, None] - place[None]).clamp(-32, 32) + 32
        dots = dots + torch.einsum("b h n d, n r d -> b h n r", q, self.table(distance).to(q)) * 0.25
        return self.out(
            rearrange(torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(-1), v), "b h n d -> b n (h d)")
        )


class CrossCovariance(nn.Module):
    """XCiT: channels attend to channels; the product sums over positions."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.temperature = nn.Linear(64, 192), nn.Linear(64, 64), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 4, 16).permute(2, 0, 3, 4, 1).unbind(0)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.proj((attn.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(batch, length, width))


class Router(nn.Module):
    """Experts mixed by the softmax of a gate."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 4), nn.Parameter(0.1 * torch.randn(4, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bse,bsef->bsf", self.gate(x).softmax(-1), torch.einsum("bsd,edf->bsef", x, self.experts))


class SoftMoE(nn.Module):
    """Soft MoE: dispatch and combine by softmaxes of products with weights, over two different axes."""

    def __init__(self):
        super().__init__()
        self.slots, self.expert = nn.Parameter(torch.randn(64, 8)), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.slots
        slots = logits.softmax(dim=1).transpose(1, 2) @ x
        return logits.softmax(dim=-1) @ self.expert(slots)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class SoftmaxPooling(nn.Module):
    """Tokens averaged by the softmax of one score each: no product of queries and keys."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).transpose(1, 2).softmax(-1) @ x).squeeze(1)


class GatedLinearUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Classifier(nn.Module):
    """Class probabilities multiplied with class embeddings: softmax of a projection, then a product."""

    def __init__(self):
        super().__init__()
        self.head, self.embeddings = nn.Linear(64, 32), nn.Parameter(torch.randn(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).softmax(-1) @ self.embeddings
