"""Seconds of several variants that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

Name = TypeVar("Name")


def median_seconds(
    variants: Mapping[Name, Callable[[], object]],
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
    calls: int = 1,
) -> dict[Name, float]:
    """Of one call, from `runs` turns of `calls` calls each; a GPU's work is part of them."""
    seconds: dict[Name, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        for name, run in variants.items():
            _finish()
            start = clock()
            for _ in range(calls):
                run()
            _finish()
            seconds[name].append((clock() - start) / calls)
    return {name: median(times) for name, times in seconds.items()}


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
