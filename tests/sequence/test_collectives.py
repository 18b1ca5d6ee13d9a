"""Collectives that start early and are waited for late, eager and compiled, in real processes."""

from __future__ import annotations

import functools
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from sequence.ranks import start_method

from sgl_npu.runtime.collectives import all_gather, all_to_all, open_shift, rank_in, ring_shift, wait
from sgl_npu.runtime.sequence import Axis

WORLD = 3
ROWS, COLUMNS = 6, 5


def of_rank(rank: int) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + 100.0 * rank


def shifted(axis: Axis, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    pending = ring_shift(x * 2, axis, step)
    meanwhile = (x @ x.t()).relu()
    return wait(pending) + 1, meanwhile


def opened(axis: Axis, x: torch.Tensor, step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    pending = open_shift(x * 2, axis.size, rank, axis.group, step)
    meanwhile = (x @ x.t()).relu()
    return wait(pending) + 1, meanwhile


def exchanged(axis: Axis, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    pending = all_to_all(x.view(axis.size, -1, COLUMNS), axis)
    meanwhile = (x @ x.t()).relu()
    return wait(pending).view(x.shape), meanwhile


def gathered(axis: Axis, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    pending = all_gather(x, axis)
    meanwhile = (x @ x.t()).relu()
    return wait(pending), meanwhile


def expected(function, rank: int, step: int) -> torch.Tensor:
    if function in (shifted, opened):
        return of_rank((rank - step) % WORLD) * 2 + 1
    if function is gathered:
        return torch.cat([of_rank(source) for source in range(WORLD)])
    return torch.cat([of_rank(source).chunk(WORLD)[rank] for source in range(WORLD)])


CALLS = {
    "shift": (shifted, 1),
    "shift back": (shifted, -1),
    "shift as an all-to-all": (opened, 1),
    "shift back as an all-to-all": (opened, -1),
    "all-to-all": (exchanged, 0),
    "all-gather": (gathered, 0),
}
MODES = {"eager": lambda function: function, "inductor": functools.partial(torch.compile, fullgraph=True)}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    axis = Axis(WORLD, dist.group.WORLD.group_name)
    results = {}
    for name, (function, step) in CALLS.items():
        for mode, compiled in MODES.items():
            try:
                own = {"rank": rank_in(axis.group)} if function is opened else {}
                out, meanwhile = compiled(functools.partial(function, axis, step=step, **own))(of_rank(rank))
                torch.testing.assert_close(out, expected(function, rank, step))
                torch.testing.assert_close(meanwhile, (of_rank(rank) @ of_rank(rank).t()).relu())
                results[name, mode] = None
            except Exception:
                results[name, mode] = traceback.format_exc()
    torch.save(results, f"{folder}/result{rank}")
    dist.destroy_process_group()


@functools.cache
def results() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_worker, (folder,), WORLD, start_method=start_method().get_start_method())
        return [torch.load(path) for path in Path(folder).glob("result*")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_computed_between_start_and_wait_leaves_the_message_as_it_was(name, mode):
    assert [result[name, mode] for result in results()] == [None] * WORLD
