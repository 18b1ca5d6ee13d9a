"""Unmodified models on ranks that share their sequence: error against one rank alone, and what they exchange."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch

import sgl_npu
from sequence.collective_counts import collective_counts
from sequence.model_cases import CASES, Inputs, error, outputs
from sequence.ranks import Outcome, RankPool

RAISED = re.compile(r"[\w.]+: ")  # a line of a traceback that names an exception
# Of a case's sizes: one that the ranks do not divide, one that they do. The tests run both in both dtypes.
MEASURED = {torch.float32: 2, torch.bfloat16: 0}
UNSHARDED: dict[str, int] = {}  # every rank does all the work: what a run without the option is
DEGREES: dict[int, tuple[dict[str, int], ...]] = {
    2: ({"ulysses": 2}, {"ring": 2}, {"kv_gather": 2}),
    4: (
        {"ulysses": 4},
        {"ring": 4},
        {"kv_gather": 4},
        {"ulysses": 2, "ring": 2},
        {"ulysses": 2, "kv_gather": 2},
    ),
}


def measure(pool: RankPool, name: str, dtype: torch.dtype, degrees: dict[str, int]) -> dict[str, Any]:
    """The worst rank's error, or why there is none."""
    length, text = CASES[name].sizes[MEASURED[dtype]]
    row = {"model": name, "dtype": str(dtype).removeprefix("torch."), "ranks": pool.size, "degrees": degrees}
    row |= {"length": length, "text": text, "attentions": CASES[name].attentions}
    found = pool.outcomes(on_rank, name, Inputs(length, text, dtype=dtype), degrees)
    if failure := first_failure(found):
        return {**row, "failure": failure}
    values = [outcome.value for outcome in found]
    same = len({value.pop("graph") for value in values}) == 1
    return {**row, **values[0], "error": max(value["error"] for value in values), "same_graph": same}


def first_failure(outcomes: Sequence[Outcome]) -> str:
    """The message of the first rank that failed, without its traceback; empty if none did."""
    text = next((outcome.failure for outcome in outcomes if outcome.failure), "")
    raised = [line for line in text.splitlines() if RAISED.match(line)]
    return (raised[-1] if raised else text)[:300]


def parallel_options(degrees: dict[str, int]) -> dict[str, Any]:
    """Options of torch.compile for degrees; none for none."""
    return {"parallel": sgl_npu.Parallel(**degrees)} if degrees else {}


@torch.no_grad()
def on_rank(name: str, wish: Inputs, degrees: dict[str, int]) -> dict[str, Any]:
    """One model, eager and alone, then compiled and shared."""
    case = CASES[name]
    module = case.module(wish.dtype)
    expected = outputs(module(**case.inputs(wish)))
    before = len(sgl_npu.reports())
    options = {"inner": "eager", "strict": True, **parallel_options(degrees)}
    compiled = torch.compile(module, backend="sgl_npu", options=options, fullgraph=True)
    found = outputs(compiled(**case.inputs(wish)))
    (report,) = sgl_npu.reports()[before:]
    return {
        "error": error(found, expected),
        "fused": report.fused,
        "collectives": collective_counts(report.graph),
        "predicted_bytes": _predicted_bytes(report),
        "graph": hashlib.sha256(report.graph.encode()).hexdigest(),
    }


def _predicted_bytes(report: sgl_npu.Report) -> int:
    """What one rank sends at the attentions of a report whose lengths are numbers."""
    return sum(int(site.sent) for site in report.sites if site.sent.isdigit())
