"""Run a function on every rank of a gloo group: processes that live through a run of tests, and never hang it.

    pool = RankPool(2)
    first, second = pool.run(function, argument)

`function` is pickled by reference, so it stands at the top of a module. A rank that raises, dies or does not answer is
a failure with its text; the ranks start anew where they may no longer agree on what they exchange next.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_SECONDS = 120.0  # imports included
COLLECTIVE_SECONDS = 45.0  # at least: the ranks do not start at the same moment
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "torch._inductor.compile_fx", "sgl_npu", "transformers"]
SHARED_SECONDS = 300.0  # of the pools of a run: both compilers and ranks share what cores there are
STACK_SECONDS = 0.5  # to write down where a rank is
NO_ANSWER = "no answer"  # of a rank that hangs; one that waits for it fails by the timeout of its group
GRACE_SECONDS = 3.0  # what the others get once one has failed: most of them wait for it


@dataclass(frozen=True)
class Outcome:
    """What one rank gave: `value`, or why there is none."""

    value: Any = None
    failure: str = ""


class RanksFailed(AssertionError):
    """Some ranks gave no value; the message has the failure of each."""


class RankPool:
    """`size` ranks with one thread each. `seconds`: what one call may take; a collective waits for most of that.

    Ranks are forks of one process that has imported what they need. `anew`: each is a process from the start, with the
    environment of now.
    """

    def __init__(self, size: int, seconds: float = 60.0, anew: bool = False) -> None:
        self.size, self.seconds, self.anew = size, seconds, anew
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What the function returns on every rank, in the order of ranks. Raises RanksFailed if one has no value."""
        outcomes = self.outcomes(function, *args, **kwargs)
        failures = [f"rank {rank}: {outcome.failure}" for rank, outcome in enumerate(outcomes) if outcome.failure]
        if failures:
            raise RanksFailed("\n".join(failures))
        return [outcome.value for outcome in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Outcome]:
        """The value or the failure of every rank."""
        if not self._ranks:
            self._start()
        outcomes = self._ask(pickle.dumps((function, args, kwargs)), self.seconds)
        if any(outcome.failure for outcome in outcomes) and not self._agree(outcomes):
            self._end(0.0)
        return outcomes

    def close(self) -> None:
        """End every rank, whatever it is doing."""
        self._end(GRACE_SECONDS)

    def _end(self, seconds: float) -> None:
        """A rank whose pipe is closed ends by itself, unless it is busy; those that do not in time are killed."""
        deadline = time.monotonic() + seconds
        for rank in self._ranks:
            rank.pipe.close()
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = start_method(self.anew)
        self._folder = tempfile.TemporaryDirectory()  # groups that are made later meet there too
        collective = max(COLLECTIVE_SECONDS, 0.75 * self.seconds)  # its error then comes before the call's end
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, collective, self._folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours))
        failures = [outcome.failure for outcome in self._answers(START_SECONDS) if outcome.failure]
        if failures:
            self._end(0.0)
            raise RanksFailed(f"{self.size} ranks did not start: {failures[0]}")

    def _agree(self, outcomes: list[Outcome]) -> bool:
        """Whether every rank failed by itself, and all can still meet."""
        if not all(outcome.failure.startswith("Traceback") for outcome in outcomes):
            return False
        return not any(outcome.failure for outcome in self._ask(pickle.dumps((_meet, (), {})), GRACE_SECONDS))

    def _ask(self, request: bytes, seconds: float) -> list[Outcome]:
        for rank in self._ranks:
            with contextlib.suppress(OSError):  # one that is gone is found by its answer
                rank.pipe.send_bytes(request)
        return self._answers(seconds)

    def _answers(self, seconds: float) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        pending = {rank.pipe: number for number, rank in enumerate(self._ranks)}
        deadline, reason = time.monotonic() + seconds, f"{NO_ANSWER} for {seconds:g} s"
        while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                number = pending.pop(pipe)
                outcomes[number] = self._ranks[number].answer()
                if outcomes[number].failure and time.monotonic() + GRACE_SECONDS < deadline:
                    deadline = time.monotonic() + GRACE_SECONDS
                    reason = f"{NO_ANSWER} for {GRACE_SECONDS:g} s after rank {number} failed"
        for number in pending.values():
            outcomes[number] = Outcome(failure=f"{reason}, while it was here:\n{self._whereabouts(number)}")
        return [outcomes[number] for number in range(self.size)]

    def _whereabouts(self, number: int) -> str:
        """The stacks of all threads of a rank that does not answer."""
        assert self._folder is not None
        path, process = _stacks(self._folder.name, number), self._ranks[number].process
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            process.join(STACK_SECONDS)
        return path.read_text() if path.exists() else ""


class RankPools:
    """One pool per number of ranks."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, size: int) -> RankPool:
        return self._pools.setdefault(size, RankPool(size, SHARED_SECONDS))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@contextlib.contextmanager
def rank_pools() -> Iterator[RankPools]:
    """Pools that end with the block."""
    pools = RankPools()
    try:
        yield pools
    finally:
        pools.close()


def start_method(anew: bool = False) -> Any:
    """The context of multiprocessing that ranks are started in."""
    if anew:
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass(frozen=True)
class _Rank:
    process: Any
    pipe: Connection

    def answer(self) -> Outcome:
        """Read what is there; a pipe that is closed means that the process ended."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join(GRACE_SECONDS)
            return Outcome(failure=f"the process ended with exit code {self.process.exitcode}")
        except Exception as error:
            return Outcome(failure=f"its value cannot be read here: {error!r}")


def _stacks(folder: str, rank: int) -> Path:
    """Where a rank writes its stacks on SIGUSR1."""
    return Path(folder) / f"stacks of rank {rank}"


def _serve(rank: int, size: int, seconds: float, folder: str, pipe: Connection) -> None:
    """One rank: join the group, then answer requests until the pipe is closed."""
    faulthandler.register(signal.SIGUSR1, _stacks(folder, rank).open("w"))
    store = f"file://{folder}/store"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}  # as torchrun does
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # Inductor's own processes would outlive one that is killed
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked through for garbage again
    _reply(pipe, lambda: dist.init_process_group("gloo", store, timedelta(seconds=seconds), size, rank))
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = pipe.recv_bytes()
            _reply(pipe, lambda request=request: _call(request))


def _call(request: bytes) -> Any:
    function, args, kwargs = pickle.loads(request)
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.reset()  # no call sees what another compiled
    return function(*args, **kwargs)


def _reply(pipe: Connection, make: Callable[[], Any]) -> None:
    try:
        answer = pickle.dumps(Outcome(make()))
    except BaseException:
        answer = pickle.dumps(Outcome(failure=traceback.format_exc()))
    pipe.send_bytes(answer)


def _meet() -> None:
    import torch.distributed as dist

    dist.barrier()
