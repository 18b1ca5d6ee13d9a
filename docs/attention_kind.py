"""A kind of attention in the tables of parallelism.md and compatibility.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionKind:
    """What its row is called, and what its calls have. `mask` and `bias` are shapes; bands are those of the op."""

    name: str
    lower: int | None = None
    upper: int | None = None
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    sinks: bool = False
    softcap: float = 0.0

    def arguments(self, heads: int, dtype: torch.dtype, empty: Callable[..., Tensor]) -> dict[str, Any]:
        """Those of an AttentionCall beside query, key and value. `empty(shape, dtype=…)` makes a tensor."""
        return {
            "mask": None if self.mask is None else empty(self.mask, dtype=torch.bool),
            "bias": None if self.bias is None else empty(self.bias, dtype=dtype),
            "sinks": empty((heads,), dtype=dtype) if self.sinks else None,
            "softcap": self.softcap,
            "lower": self.lower,
            "upper": self.upper,
        }
