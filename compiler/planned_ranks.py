"""Ranks that do not exist, so that one process can show what each of them would get."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


@contextlib.contextmanager
def planned_ranks(count: int) -> Iterator[None]:
    """A process group in which this process is the first of `count` ranks and nobody answers: messages hold anything.

    Every rank gets the same graph, so the report is right; values that the call computes are not. Nothing is done where
    one rank is asked for, where there is a process group already, or where this torch has no such backend.
    """
    if count == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
