"""Run cases, each in a fresh process with a time limit."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.coverage.case import Setting

# Imported once, in the process that the cases are forked from.
PRELOADED = ["torch._inductor.compile_fx", "transformers.modeling_utils", "sgl_npu", "benchmarks.coverage.one_case"]


def run_cases(
    names: Sequence[str], setting: Setting, backend: str, platform: str, mode: str, jobs: int, timeout: float
) -> Iterator[dict[str, Any]]:
    """One record per case, in the order of the names."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda name: _run(context, timeout, name, setting, backend, platform, mode), names)


def _run(
    context: Any, timeout: float, name: str, setting: Setting, backend: str, platform: str, mode: str
) -> dict[str, Any]:
    from benchmarks.coverage.one_case import run_case

    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_case, args=(sender, name, setting, backend, platform, mode), daemon=True)
    start = time.perf_counter()
    process.start()
    sender.close()
    record = _receive(receiver, timeout)
    if record is None:
        ended = process.exitcode is not None or not process.is_alive()
        library, family, _ = name.split("/")
        record = {"case": name, "library": library, "family": family, "status": "crash" if ended else "timeout"}
        record |= {"backend": backend, "platform": platform, "mode": mode, "seq": setting.seq}
        record["dtype"] = str(setting.dtype).removeprefix("torch.")
        process.kill()
    process.join()
    if record["status"] == "crash":
        record["error"] = f"exit code {process.exitcode}"
    return {**record, "wall_s": round(time.perf_counter() - start, 2)}


def _receive(receiver: Connection, timeout: float) -> dict[str, Any] | None:
    """What the process sends; None if it ends or takes too long."""
    try:
        return receiver.recv() if receiver.poll(timeout) else None
    except EOFError:
        return None
