"""Merge what attention gave over disjoint sets of keys, weighted by their lse.

    lse = log(sum over parts of exp(lse_p))        out = sum over parts of exp(lse_p - lse) * out_p

In float32 whatever the dtype of the parts. A part without keys has out = 0 and lse = -inf, and so has a merge of such
parts. Only max, exp, log and where are used, which every compiler takes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_npu.runtime.attention import compute_dtype


@dataclass(frozen=True)
class Part:
    """Attention over some of the keys: out (B, H, S, Dv) and lse (B, H, S)."""

    out: Tensor
    lse: Tensor

    def where(self, condition: Tensor) -> Part:
        """The part where the condition holds; no keys elsewhere. `condition` broadcasts to lse."""
        return Part(self.out, torch.where(condition, self.lse, -math.inf))


def joined(parts: list[Part]) -> Part:
    """One part of all rows, from those of rows that follow each other."""
    return Part(torch.cat([x.out for x in parts], 2), torch.cat([x.lse for x in parts], 2))


def merge(parts: list[Part]) -> Part:
    """One part over the keys of all; its out has the dtype in which scores are kept."""
    dtype = compute_dtype(parts[0].out.dtype)
    if len(parts) == 1:
        return Part(parts[0].out.to(dtype), parts[0].lse)
    top = functools.reduce(torch.maximum, [part.lse for part in parts])
    top = torch.where(top == -math.inf, 0.0, top)
    # Equal ones first: inf - inf would be NaN.
    weights = [torch.exp(torch.where(part.lse == top, 0.0, part.lse - top)) for part in parts]
    total = functools.reduce(torch.add, weights)
    shares = [weight / torch.where(total == 0.0, 1.0, total) for weight in weights]
    outs = [part.out.to(dtype) * share.unsqueeze(-1) for part, share in zip(parts, shares, strict=True)]
    return Part(functools.reduce(torch.add, outs), top + torch.log(total))
