"""How much of two ranks one attention uses: CPU seconds of one rank alone / (ranks x CPU seconds of the busiest).

CPU seconds of a process are those of all its threads, gloo's too; wall clock says nothing on a machine with other work.
All ranks do the whole attention at the same time when it is timed: two busy processes share caches, memory and perhaps
a core, and CPU seconds grow with that, whatever the scheme. So they do with other work on the machine, which comes and
goes: the ratio is taken within each turn of all schemes, and the median of the turns counts.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.sequence.pages import FRESH, KEPT, pages
from benchmarks.sequence.schemes import HEAD_SIZE, HEADS, SCHEMES, Attend, Task, place, single
from sequence.ranks import RankPool

ALONE = "1 rank"
LENGTHS = {  # by whether the allocator keeps pages, and whether attention is causal
    FRESH: {True: (4096, 8192, 16384), False: (8192,)},
    KEPT: {True: (4096,), False: ()},
}


@dataclass(frozen=True)
class Runs:
    """What one rank gave for one scheme: CPU seconds and minor page faults of each turn, and the error of its rows."""

    seconds: list[float]
    faults: list[int]
    error: float


def measure(pool: RankPool, kind: str, task: Task, repeats: int) -> list[dict[str, Any]]:
    """A row for every scheme that exists; all take turns within one run. The pool starts with pages of that kind."""
    names = [name for name, scheme in SCHEMES.items() if scheme.exists]
    with pages(kind):
        found = pool.run(on_rank, task, names, repeats)
    alone = _turns([run[ALONE].seconds for run in found], mean)
    rows = []
    for name in names:
        runs = [run[name] for run in found]
        busiest = _turns([run.seconds for run in runs], max)
        rows.append(
            {
                "length": task.length,
                "dtype": str(task.dtype).removeprefix("torch."),
                "causal": task.causal,
                "pages": kind,
                "scheme": name,
                "ranks": pool.size,
                "repeats": repeats,
                "alone_seconds": median(alone),
                "seconds": [median(run.seconds) for run in runs],
                "faults": max(median(run.faults) for run in runs),
                "efficiency": median(one / (pool.size * most) for one, most in zip(alone, busiest, strict=True)),
                "error": max(run.error for run in runs),
            }
        )
    return rows


def _turns(seconds: list[list[float]], of_ranks: Callable[[Sequence[float]], float]) -> list[float]:
    """One number for each turn, from those of all ranks."""
    return [of_ranks(turn) for turn in zip(*seconds, strict=True)]


@torch.no_grad()
def on_rank(task: Task, names: Sequence[str], repeats: int) -> dict[str, Runs]:
    """What this rank gives, by scheme."""
    whole = _tensors(task)
    runs: dict[str, tuple[Attend, tuple[Tensor, ...]]] = {ALONE: (single(task), whole)}
    expected, errors = single(task)(*whole), {ALONE: 0.0}
    for name in names:
        layout = SCHEMES[name].layout(task)
        rows = layout.positions(place(layout))
        local = tuple(_rows(x, rows) for x in whole)
        runs[name] = SCHEMES[name].adapt(task, layout), local
        errors[name] = (runs[name][0](*local).float() - expected[:, :, rows].float()).abs().max().item()
    found = {name: Runs([], [], error) for name, error in errors.items()}
    for _ in range(repeats):
        for name, (attend, tensors) in runs.items():
            dist.barrier()
            faults, start = _faults(), time.process_time()
            attend(*tensors)
            found[name].seconds.append(time.process_time() - start)
            found[name].faults.append(_faults() - faults)
    return found


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _tensors(task: Task) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, task.length, HEADS, HEAD_SIZE).to(task.dtype).transpose(1, 2) for _ in range(3))


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the sequence, in the memory order of a model."""
    return x.transpose(1, 2)[:, rows].contiguous().transpose(1, 2)
