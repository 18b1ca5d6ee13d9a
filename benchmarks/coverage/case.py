"""What a case is: a tiny model with inputs, how its attention is spelled, and how many sites it should have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """What every case is built for."""

    batch: int = 2
    seq: int = 64
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Built:
    """A model and the arguments of one call. A cache among the arguments is changed by a call: take `fresh` ones.

    `valid` (batch, length) is False where a token is padding: what a model computes there is nobody's concern.
    """

    model: torch.nn.Module
    kwargs: dict[str, Any]
    valid: torch.Tensor | None = None

    def fresh(self) -> dict[str, Any]:
        return copy.deepcopy(self.kwargs)


@dataclass(frozen=True)
class Case:
    """`spelling`: eager (written by hand) or sdpa. `variant`: "", pad, decode. `sites`: expected, None if unknown.

    A `negative` family has no attention, however much it looks like one: nothing in it may be rewritten.
    """

    library: str
    family: str
    spelling: str
    build: Callable[[Setting], Built] = field(compare=False)
    variant: str = ""
    sites: int | None = None
    negative: bool = False

    @property
    def name(self) -> str:
        return f"{self.library}/{self.family}/{self.spelling}" + (f"+{self.variant}" if self.variant else "")
