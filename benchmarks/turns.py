"""Seconds of several variants that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

from sgl_npu.compiler.timing import Name, seconds_in_turns


def median_seconds(
    variants: Mapping[Name, Callable[[], object]],
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
    calls: int = 1,
) -> dict[Name, float]:
    """Of one call, from `runs` turns of `calls` calls each; an accelerator's work is part of them."""
    return {name: median(times) for name, times in seconds_in_turns(variants, runs, clock, calls).items()}
