"""`python -m benchmarks.sequence`: efficiency of one attention, models and memory, on gloo ranks of this machine.

Writes benchmarks/sequence/results.json and the tables of benchmarks/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.readme import fill
from benchmarks.sequence import efficiency, memory, model_runs
from benchmarks.sequence.schemes import Task
from benchmarks.sequence.tables import TABLES, setting
from sequence.model_cases import CASES
from sequence.ranks import RankPool

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
DTYPES = (torch.float32, torch.bfloat16)
CALL_SECONDS = 600.0
Rows = Iterator[dict[str, Any]]


def main(
    only: Annotated[str, typer.Option(help="tables, separated by commas; the others keep their results")] = "",
    models: Annotated[str, typer.Option(help="models, separated by semicolons")] = "",
    ranks: Annotated[str, typer.Option(help="numbers of ranks that models and memory are measured on")] = "2,4",
    lengths: Annotated[str, typer.Option(help="lengths of the attention or prefill, instead of its own")] = "",
    repeats: Annotated[int, typer.Option(help="turns of each scheme")] = 7,
    unsharded: Annotated[bool, typer.Option(help="no degrees: every rank does all the work")] = False,
    write: Annotated[bool, typer.Option(help="store the results and fill the tables")] = True,
) -> None:
    """Measure, then write the tables."""
    sizes = [int(size) for size in ranks.split(",")]
    chosen = [int(length) for length in lengths.split(",") if length]
    degrees = {size: (model_runs.UNSHARDED,) if unsharded else model_runs.DEGREES[size] for size in sizes}
    measures: dict[str, Callable[[], Rows]] = {
        "sequence_efficiency": lambda: _efficiency(chosen, repeats),
        "sequence_models": lambda: _models(models.split(";") if models else list(CASES), degrees),
        "sequence_memory": lambda: _memory(chosen or memory.LENGTHS, degrees),
    }
    names = only.split(",") if only else list(measures)
    if unknown := (set(names) - set(measures)) | (set(models.split(";") if models else ()) - set(CASES)):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join((*measures, *CASES))}")
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        rows = []
        for row in measures[name]():
            rows.append(row)
            print(json.dumps(row), flush=True)
        stored[name] = {"measured": setting(), "rows": rows}
    if write:
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        tables = {name: {**stored[name], "rows": TABLES[name](stored[name]["rows"])} for name in stored}
        readme = ROOT / "benchmarks" / "README.md"
        readme.write_text(fill(readme.read_text(), tables))


def _efficiency(lengths: Sequence[int], repeats: int) -> Rows:
    for kind, by_mask in efficiency.LENGTHS.items():
        with _pool(2) as pool:
            for causal, own in by_mask.items():
                for dtype in DTYPES:
                    for length in lengths or own:
                        yield from efficiency.measure(pool, kind, Task(length, dtype, causal), repeats)


def _models(names: list[str], degrees: dict[int, Any]) -> Rows:
    for size, combinations in degrees.items():
        with _pool(size) as pool:
            for name in names:
                for combination in combinations:
                    for dtype in DTYPES:
                        yield model_runs.measure(pool, name, dtype, combination)


def _memory(lengths: Sequence[int], degrees: dict[int, Any]) -> Rows:
    for size, combinations in degrees.items():
        with _pool(size) as pool:
            for length in lengths:
                for combination in combinations:
                    yield memory.measure(pool, length, combination)


def _pool(size: int) -> closing[RankPool]:
    return closing(RankPool(size, CALL_SECONDS, anew=True))


if __name__ == "__main__":
    typer.run(main)
