"""Packed and paged calls of ops.attention, and what they must give, spelled out sequence by sequence in float64."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor


def formula(query, key, value, lengths, *, scale=None, causal=False, window_size=(-1, -1), softcap=0.0, sinks=None):
    """(out, lse) of sequences whose (queries, keys) are `lengths`; keys packed end to end, all in float64."""
    scale = query.size(-1) ** -0.5 if scale is None else scale
    outs, lses, row, column = [], [], 0, 0
    for rows, keys in lengths:
        q = query[row : row + rows].double()
        k, v = (x[column : column + keys].double().repeat_interleave(q.size(1) // x.size(1), 1) for x in (key, value))
        row, column = row + rows, column + keys
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        for i in range(rows):
            for j in range(keys):
                distance = j - (i + keys - rows)
                left, right = window_size[0], 0 if causal else window_size[1]
                if (left >= 0 and distance < -left) or (right >= 0 and distance > right):
                    scores[:, i, j] = -math.inf
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, rows, 1)], -1)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :keys]
        outs.append(torch.einsum("hij,jhd->ihd", weights, v))
        lses.append(torch.logsumexp(scores, -1).T if scores.size(-1) else torch.full(q.shape[:2], -math.inf).double())
    return torch.cat(outs), torch.cat(lses)


def packed(lengths, heads=4, kv_heads=2, dim=64, value_dim=None, dtype=torch.bfloat16):
    """query, key, value and both lists of ends."""
    rows, keys = ([length[i] for length in lengths] for i in (0, 1))
    query = torch.randn(sum(rows), heads, dim, dtype=dtype)
    key, value = (torch.randn(sum(keys), kv_heads, d, dtype=dtype) for d in (dim, value_dim or dim))
    return query, key, value, list(accumulate(rows)), list(accumulate(keys))


def paged(key: Tensor, value: Tensor, kv_ends: list[int], block: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The same keys in caches of shuffled blocks, NaN where no key is: the caches, the table, and the key counts."""
    counts = [end - start for start, end in zip((0, *kv_ends), kv_ends, strict=False)]
    columns = max(1, max(-(-count // block) for count in counts))
    table = torch.randperm(len(counts) * columns + 1)[: len(counts) * columns].view(len(counts), columns)
    caches = [x.new_full((len(counts) * columns + 1, block, *x.shape[1:]), math.nan) for x in (key, value)]
    for row, start, count in zip(table.tolist(), (0, *kv_ends), counts, strict=False):
        for position in range(count):
            for cache, x in zip(caches, (key, value), strict=True):
                cache[row[position // block], position % block] = x[start + position]
    return caches[0], caches[1], table.to(torch.int32), counts
