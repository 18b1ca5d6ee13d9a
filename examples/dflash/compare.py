"""The same prompts with and without drafts, compiled, in one run: tokens, passes, seconds and graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import sgl_npu
from examples.dflash.decode import Alone, Decoded, Speculative
from examples.dflash.draft import Draft
from examples.dflash.model import Target

T = TypeVar("T")
GRAPHS = {"alone": 2, "speculative": 4}  # prompt and step; prompt, draft, verification and what it leaves in caches


@dataclass
class Side:
    """One way to decode: what it compiled, and what it did after that."""

    reports: list[sgl_npu.Report]
    compile_seconds: float
    decoded: list[Decoded] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Outcome:
    alone: Side
    speculative: Side

    @property
    def different(self) -> list[int]:
        """The prompts, by number, after which the two say different things."""
        pairs = zip(self.alone.decoded, self.speculative.decoded, strict=True)
        return [number for number, (one, other) in enumerate(pairs) if one.tokens != other.tokens]

    @property
    def accepted(self) -> list[int]:
        """Tokens of each pass of the target over a block: drafted ones that it takes, and its own behind them."""
        return [count for decoded in self.speculative.decoded for count in decoded.accepted]

    @property
    def acceptance_length(self) -> float:
        """Tokens per pass of the target; it is 1 for the target alone."""
        return sum(self.accepted) / len(self.accepted)

    @property
    def speed_up(self) -> float:
        """Wall clock of the target alone over that with drafts, prompts included, compilation not."""
        return self.alone.seconds / self.speculative.seconds

    @property
    def graphs(self) -> dict[str, int]:
        return {"alone": len(self.alone.reports), "speculative": len(self.speculative.reports)}


def compare(target: Target, draft: Draft, prompts: Sequence[Tensor], count: int, options: dict[str, Any]) -> Outcome:
    """`count` tokens, 2 or more, after each prompt (1, S), one way and the other in turns.

    The first prompt compiles the graphs beforehand; `options` are those of the backend.
    """
    torch._dynamo.reset()

    def compiled(fn: Callable) -> Callable:
        return torch.compile(fn, backend="sgl_npu", options=options)

    ways: tuple[Alone | Speculative, ...] = (Alone(target, compiled), Speculative(target, draft, compiled))
    sides = []
    for way in ways:
        before = len(sgl_npu.reports())
        _, seconds = timed(way.generate, prompts[0], count)
        sides.append(Side(sgl_npu.reports()[before:], seconds))
    before = len(sgl_npu.reports())
    for prompt in prompts:
        for way, side in zip(ways, sides, strict=True):
            decoded, seconds = timed(way.generate, prompt, count)
            side.decoded.append(decoded)
            side.seconds += seconds
    sides[1].reports += sgl_npu.reports()[before:]
    return Outcome(*sides)


def timed(fn: Callable[..., T], *args: Any) -> tuple[T, float]:
    """What `fn` returns, and the seconds that took."""
    start = time.perf_counter()
    found = fn(*args)
    return found, time.perf_counter() - start
