"""Attention written by hand, in the spellings that people use: what the matcher's tests are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

B, H, S, D = 2, 4, 24, 16
MIN = torch.finfo(torch.float32).min


def inputs(rows=S, keys=S, heads=H, kv_heads=H, dim=D, value_dim=D, dtype=torch.float32, batch=B):
    """Query, key and value (B, H, S, D)."""
    shapes = (batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim)
    return [torch.randn(shape, dtype=dtype) / 2 for shape in shapes]


def causal(rows, keys):
    return torch.arange(keys) <= torch.arange(rows)[:, None] + (keys - rows)


def divided(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1) @ v


def multiplied(q, k, v):
    return torch.matmul(F.softmax(torch.matmul(q, k.mT) * D**-0.5, dim=-1), v)


def unscaled(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3), dim=3) @ v


def scaled_query(q, k, v):
    return ((q * 0.25) @ k.transpose(-2, -1)).softmax(-1) @ v


def scaled_both(q, k, v):
    return ((q * 0.5) @ (k / 2).transpose(-2, -1)).softmax(-1) @ v


def scaled_by_tensor(q, k, v):
    return (q @ k.transpose(-2, -1) / torch.sqrt(q.new_full((), D)).sin()).softmax(-1) @ v


def scaled_per_head(q, k, v):
    logit_scale = torch.arange(1, 1 + q.shape[1], dtype=q.dtype).view(-1, 1, 1) / 8
    return (q @ k.transpose(-2, -1) * logit_scale).softmax(-1) @ v


def upcast(q, k, v):
    scores = (q @ k.transpose(2, 3) * 0.25).float()
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def shifted(q, k, v):
    scores = q @ k.transpose(-2, -1) * 0.25
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def grouped(q, k, v):
    groups = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape[0], -1, *x.shape[2:]) for x in (k, v))
    return upcast(q, k, v)


def interleaved(q, k, v):
    return divided(q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)))


def grouped_in_five_dims(q, k, v):
    q5 = q.unflatten(1, (k.shape[1], -1))
    p = (q5 @ k.unsqueeze(2).transpose(-2, -1) * 0.25).softmax(-1)
    return (p @ v.unsqueeze(2)).flatten(1, 2)


def einsum(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p = torch.einsum("bqhd,bkhd->bhqk", q * 0.25, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def einsum_heads_first(q, k, v):
    p = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.25).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", p, v)


def three_dims(q, k, v):
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, -1), v)


def baddbmm(q, k, v):
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v).view(*shape[:3], -1)


def alibi(q, k, v):
    shape = q.shape
    slopes = torch.arange(1, 1 + shape[1], dtype=q.dtype).view(1, -1, 1, 1)
    bias = (slopes * torch.arange(k.shape[2], dtype=q.dtype) / -8).expand(shape[0], -1, -1, -1).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v).view(*shape[:3], -1)


def biased(q, k, v):
    table = torch.linspace(-1, 1, q.shape[1] * 8).view(8, -1).to(q.dtype)
    distance = (torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]).clamp(-4, 3) + 4
    bias = table[distance].permute(2, 0, 1).unsqueeze(0)
    return ((q @ k.transpose(-2, -1)) + bias).softmax(-1) @ v


def softcapped(q, k, v):
    return (5.0 * torch.tanh(q @ k.transpose(-2, -1) * 0.25 / 5.0)).softmax(-1) @ v


def with_sinks(q, k, v):
    sinks = torch.linspace(-1, 1, q.shape[1]).to(q.dtype)
    scores = q @ k.transpose(-2, -1) * 0.25
    scores = scores.masked_fill(~causal(q.shape[2], k.shape[2]), torch.finfo(q.dtype).min)
    scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1].to(q.dtype) @ v


def channels_first(q, k, v):
    q, k, v = (x[:, 0].transpose(1, 2) for x in (q, k, v))
    p = torch.bmm(q.transpose(1, 2), k).softmax(-1)
    return torch.bmm(v, p.transpose(1, 2))


def packed(q, k, v):
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2).permute(2, 0, 3, 1, 4)
    return multiplied(*qkv.unbind(0)).transpose(1, 2).flatten(2)


def cached(q, k, v):
    return divided(q[:, :, -1:], torch.cat((k[:, :, :10], k[:, :, 10:]), 2), torch.cat((v[:, :, :10], v[:, :, 10:]), 2))


def filled(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    return scores.masked_fill(causal(q.shape[2], k.shape[2]).logical_not(), -math.inf).softmax(-1) @ v


def filled_with_minimum(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    return scores.masked_fill(~causal(q.shape[2], k.shape[2]), torch.finfo(q.dtype).min).softmax(-1) @ v


def where(q, k, v):
    scores = q @ k.transpose(-2, -1) * 0.25
    low = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return torch.where(causal(q.shape[2], k.shape[2]), scores, low).softmax(-1) @ v


def added(q, k, v):
    keep = causal(q.shape[2], k.shape[2])[None, None].expand(q.shape[0], 1, -1, -1)
    mask = torch.where(keep, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    return F.softmax(q @ k.transpose(2, 3) * 0.25 + mask[:, :, :, : k.shape[2]], dim=-1) @ v


def added_to_bias(q, k, v):
    keep = causal(q.shape[2], k.shape[2])
    mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -math.inf)
    bias = torch.linspace(-1, 1, k.shape[2]).to(q.dtype) + mask
    return (q @ k.transpose(2, 3) * 0.25 + bias).softmax(-1) @ v


def scaled_after_mask(q, k, v):
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype).masked_fill(~causal(q.shape[2], k.shape[2]), -math.inf)
    return ((q @ k.transpose(2, 3) + mask) * 0.25).softmax(-1) @ v


PLAIN = (
    divided, multiplied, unscaled, scaled_query, scaled_both, scaled_by_tensor, scaled_per_head, upcast, shifted,
    einsum, einsum_heads_first, three_dims, baddbmm, packed, cached, channels_first, softcapped,
)  # fmt: skip
GROUPED = (grouped, interleaved, grouped_in_five_dims)
CAUSAL = (filled, filled_with_minimum, where, added, scaled_after_mask, with_sinks)
BIASED = (alibi, biased, added_to_bias)
