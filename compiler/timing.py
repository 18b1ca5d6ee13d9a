"""How long the ways of running a model take, and how far their answers are apart."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from sgl_npu.compiler.progress import Step, silent

Name = TypeVar("Name")

# One row per way of running a model.
VARIANTS: dict[str, Callable[[Callable], Callable]] = {
    "eager": lambda model: model,
    "inductor": lambda model: torch.compile(model, backend="inductor"),
    "sgl_npu": lambda model: torch.compile(model, backend="sgl_npu"),
}


class NoTensor(ValueError):
    """A model whose result cannot be compared with another's."""


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call; the variants took turns, `runs` times each."""

    variant: str
    median: float
    fastest: float
    runs: int


def measure_time(callers: Mapping[str, Callable[[], object]], runs: int, step: Step = silent) -> tuple[Timing, ...]:
    """Per variant, after one call that compiles. They take turns, so that a busy machine is unfair to none.

    There is a step per variant and one per turn.
    """
    for name, call in callers.items():
        step(f"compiling {name}")
        call()
    spent = seconds_in_turns(callers, runs, step=step)
    return tuple(Timing(name, statistics.median(seconds), min(seconds), runs) for name, seconds in spent.items())


def seconds_in_turns(
    callers: Mapping[Name, Callable[[], object]],
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
    calls: int = 1,
    step: Step = silent,
) -> dict[Name, list[float]]:
    """Seconds of one call, from `runs` turns of `calls` calls each; an accelerator's work is part of them.

    Each turn has an order of its own, the same in every process: what a call leaves in caches and clocks speeds the
    next one up or slows it down, and that is to be no variant's privilege.
    """
    spent: dict[Name, list[float]] = {name: [] for name in callers}
    shuffled = random.Random(0)
    for _ in range(runs):
        step("timing")
        for name in shuffled.sample(list(callers), len(callers)):
            _finish()
            start = clock()
            for _ in range(calls):
                callers[name]()
            _finish()
            spent[name].append((clock() - start) / calls)
    return spent


def _finish() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def first_output(result: Any) -> torch.Tensor:
    """The first tensor of what a model returned: its logits, its sample. Raises NoTensor where there is none."""
    found = next((x for x in tree_leaves(result) if isinstance(x, torch.Tensor)), None)
    if found is None:
        raise NoTensor(f"the model returns no tensor but {type(result).__name__}, and nothing can be compared")
    return found


def max_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (found.float() - expected.float()).abs().max().item()
