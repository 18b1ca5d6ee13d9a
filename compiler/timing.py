"""How long the ways of running a model take, and how far their answers are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# One row per way of running a model.
VARIANTS: dict[str, Callable[[Callable], Callable]] = {
    "eager": lambda model: model,
    "inductor": lambda model: torch.compile(model, backend="inductor"),
    "sgl_npu": lambda model: torch.compile(model, backend="sgl_npu"),
}


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call; the variants took turns, `runs` times each."""

    variant: str
    median: float
    fastest: float
    runs: int


def measure_time(callers: Mapping[str, Callable[[], object]], runs: int) -> tuple[Timing, ...]:
    """Per variant, after one call that compiles. They take turns, so that a busy machine is unfair to none."""
    spent: dict[str, list[float]] = {name: [] for name in callers}
    for call in callers.values():
        call()
    for _ in range(runs):
        for name, call in callers.items():
            _finish()
            start = time.perf_counter()
            call()
            _finish()
            spent[name].append(time.perf_counter() - start)
    return tuple(Timing(name, statistics.median(seconds), min(seconds), runs) for name, seconds in spent.items())


def _finish() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def first_output(result: Any) -> torch.Tensor:
    """The logits or the sample of what a model returned."""
    return result if isinstance(result, torch.Tensor) else result[0]


def max_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (found.float() - expected.float()).abs().max().item()
