"""How much of two ranks one attention uses: CPU seconds of one rank alone / (ranks x CPU seconds of the busiest).

CPU seconds of a process are those of all its threads, gloo's too; wall clock says nothing on a machine with other work.
All ranks do the whole attention at the same time when it is timed: two busy processes share caches, memory and perhaps
a core, and CPU seconds grow with that, whatever the scheme.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.sequence.schemes import HEAD_SIZE, HEADS, SCHEMES, Attend, Task, place, single
from sequence.ranks import RankPool

ALONE = "1 rank"
LENGTHS = {True: (4096, 8192, 16384), False: (8192,)}  # causal or not


def measure(pool: RankPool, task: Task, repeats: int) -> list[dict[str, Any]]:
    """A row for every scheme that exists; all take turns within one run."""
    names = [name for name, scheme in SCHEMES.items() if scheme.exists]
    found = pool.run(on_rank, task, names, repeats)
    alone = median(run[ALONE]["seconds"] for run in found)
    rows = []
    for name in names:
        seconds = [run[name]["seconds"] for run in found]
        rows.append(
            {
                "length": task.length,
                "dtype": str(task.dtype).removeprefix("torch."),
                "causal": task.causal,
                "scheme": name,
                "ranks": pool.size,
                "repeats": repeats,
                "alone_seconds": alone,
                "seconds": seconds,
                "efficiency": alone / (pool.size * max(seconds)),
                "error": max(run[name]["error"] for run in found),
            }
        )
    return rows


@torch.no_grad()
def on_rank(task: Task, names: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """Median CPU seconds of this rank and the error of its rows, by scheme."""
    whole = _tensors(task)
    runs: dict[str, tuple[Attend, tuple[Tensor, ...]]] = {ALONE: (single(task), whole)}
    expected, errors = single(task)(*whole), {ALONE: 0.0}
    for name in names:
        layout = SCHEMES[name].layout(task)
        rows = layout.positions(place(layout))
        local = tuple(_rows(x, rows) for x in whole)
        runs[name] = SCHEMES[name].adapt(task, layout), local
        errors[name] = (runs[name][0](*local).float() - expected[:, :, rows].float()).abs().max().item()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (attend, tensors) in runs.items():
            dist.barrier()
            start = time.process_time()
            attend(*tensors)
            seconds[name].append(time.process_time() - start)
    return {name: {"seconds": median(seconds[name]), "error": errors[name]} for name in runs}


def _tensors(task: Task) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, task.length, HEADS, HEAD_SIZE).to(task.dtype).transpose(1, 2) for _ in range(3))


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the sequence, in the memory order of a model."""
    return x.transpose(1, 2)[:, rows].contiguous().transpose(1, 2)
