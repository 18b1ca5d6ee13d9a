"""Peak memory of a long prefill on each rank: what torch's allocator holds beyond what it held before the call."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.sequence.model_runs import UNSHARDED, first_failure, parallel_options
from sequence.model_cases import CASES, Inputs
from sequence.ranks import RankPool

MODEL = "Llama, dynamic cache"
LENGTHS = (4096, 16384)


def measure(pool: RankPool, length: int, degrees: dict[str, int], inner: str = "inductor") -> dict[str, Any]:
    """One row: the peak of every rank, in MB, in bfloat16, beside one of a rank that does all the work."""
    row = {"model": MODEL, "length": length, "ranks": pool.size, "degrees": degrees, "inner": inner}
    found = pool.outcomes(on_rank, length, degrees, inner)
    if failure := first_failure(found):
        return {**row, "failure": failure}
    alone = pool.run(on_rank, length, UNSHARDED, inner)[0]
    return {**row, "alone_mb": alone, "peak_mb": [outcome.value for outcome in found]}


@torch.no_grad()
def on_rank(length: int, degrees: dict[str, int], inner: str) -> float:
    """MB at the peak of the second call, which compiles nothing; its outputs and cache are part of them."""
    wish = Inputs(length, dtype=torch.bfloat16)
    case = CASES[MODEL]
    options = {"inner": inner, **parallel_options(degrees)}
    compiled = torch.compile(case.module(wish.dtype), backend="sgl_npu", options=options, dynamic=False)
    compiled(**case.inputs(wish))
    inputs = case.inputs(wish)
    return peak_bytes(lambda: compiled(**inputs)) / 2**20


def peak_bytes(run: Callable[[], object]) -> int:
    """The highest sum of bytes allocated and freed during a call, from the profiler's trace of the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del kept
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))
