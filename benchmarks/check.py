"""`python -m benchmarks.check`: what was measured last, beside baselines.json; exit code 1 where it is worse.

Only ratios, counts and shares are compared, each with the noise that repeated runs of it have shown: on a CPU absolute
times say nothing. `--accept` makes what was measured last the baseline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
BASELINES = HERE / "baselines.json"
PAGES = sorted((HERE.parent / "docs").glob("coverage*.md"))
RESULTS = {
    "": HERE / "results.json",
    "sequence": HERE / "sequence/results.json",
    "ascend": HERE / "ascend/results.json",
}


@dataclass(frozen=True)
class Measure:
    """A column of a table whose rows are named by `keys`. `noise` is a share of the baseline."""

    table: str
    keys: tuple[str, ...]
    column: str
    better: Literal["higher", "lower"]
    noise: float


_LAYER, _SPARSE = ("dtype", "S"), ("method", "dtype", "tokens", "sparsity")
_EFFICIENCY = ("length", "dtype", "causal", "pages", "scheme", "ranks")
_ASCEND = ("model", "spelling", "compiler", "who")
_COVERAGE = ("page", "run")
MEASURES = (
    Measure("npu_graph", ("what",), "count", "lower", 0.5),  # counts of none or one, and an error
    Measure("demo", ("model", "platform", "dtype"), "attentions fused", "higher", 0.0),
    Measure("demo", ("model", "platform", "dtype"), "graphs (eager backend)", "lower", 0.0),
    Measure("speed", ("model", "dtype"), "eager / ours", "higher", 0.15),
    Measure("speed", ("model", "dtype"), "plain Inductor / ours", "higher", 0.08),
    Measure("compile_time", ("Llama", "layers"), "ours", "lower", 1.0),
    Measure("layer", _LAYER, "Inductor / ours", "higher", 0.25),
    Measure("layer", _LAYER, "hand-called SDPA / ours", "higher", 0.1),
    Measure("layer", _LAYER, "ours", "lower", 0.4),
    Measure("decode", ("layers", "dtype", "batch"), "plain Inductor / ours", "higher", 0.1),
    Measure("sparse_speed", _SPARSE, "speed-up", "higher", 0.15),
    Measure("sparse_quality", ("method", "tokens", "sparsity"), "recall", "higher", 0.02),
    Measure("layer_gpu", _LAYER, "hand-called SDPA / ours", "higher", 0.05),
    Measure("sparse_speed_gpu", _SPARSE, "of 1 / density", "higher", 0.05),
    Measure("sequence_efficiency", _EFFICIENCY, "efficiency", "higher", 0.05),
    Measure("sequence_models", ("model", "dtype", "ranks", "degrees", "length"), "fused", "higher", 0.0),
    Measure("sequence_models", ("model", "dtype", "ranks", "degrees", "length"), "predicted_bytes", "lower", 0.0),
    Measure("ascend", _ASCEND, "fused", "higher", 0.0),
    Measure("ascend", _ASCEND, "graphs", "lower", 0.0),
    Measure("ascend", _ASCEND, "first.attention_bytes", "lower", 0.0),
    Measure("ascend", _ASCEND, "ge.compute", "lower", 0.0),
    Measure("coverage", _COVERAGE, "hand-written sites found", "higher", 0.0),
    Measure("coverage", _COVERAGE, "SDPA calls captured", "higher", 0.0),
    Measure("coverage", _COVERAGE, "values beyond the tolerance", "lower", 0.0),
    Measure("coverage", _COVERAGE, "errors, crashes, timeouts", "lower", 0.0),
    Measure("coverage", _COVERAGE, "graph breaks more than aot_eager", "lower", 0.0),
)

Values = dict[str, float]
Rows = list[dict[str, Any]]


def measured(tables: Mapping[str, Rows]) -> Values:
    """The number of every measure and row, by a name that says which it is."""
    found = {}
    for measure in MEASURES:
        for row in tables.get(measure.table, ()):
            value = number(_at(row, measure.column))
            if value is not None and (measure.table != "ascend" or row["who"] == "ours"):
                found[_name(measure, row)] = value
    return found


def _name(measure: Measure, row: Mapping[str, Any]) -> str:
    keys = ", ".join(str(row[key]) for key in measure.keys)
    return f"{measure.table}: {keys}: {measure.column}"


def _at(row: Any, path: str) -> Any:
    for part in path.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row


def number(cell: Any) -> float | None:
    """The number a cell begins with, as in 1.18x, 0.8 %, 4.9e-03; of "4 of 4" the share."""
    if isinstance(cell, (int, float)):
        return float(cell)
    found = re.match(r"-?[\d.]+(?:e-?\d+)?", str(cell))
    if found is None:
        return None
    if share := re.fullmatch(r"(\d+) of (\d+)", str(cell)):
        return int(share[1]) / int(share[2]) if int(share[2]) else None
    return float(found[0])


def read_tables() -> dict[str, Rows]:
    """Every table that was measured, as rows of named columns."""
    tables: dict[str, Rows] = {}
    for name, path in RESULTS.items():
        stored = json.loads(path.read_text()) if path.exists() else {}
        for table, content in ({name: stored} if name == "ascend" else stored).items():
            tables[table] = _rows(content["rows"])
    tables["coverage"] = [row for page in PAGES for row in _summary(page)]
    return tables


def _summary(page: Path) -> Rows:
    """Our runs of a page of coverage, which are columns of its summary."""
    lines = page.read_text().split("## Summary")[1].split("\n##")[0].strip().splitlines()
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [
        {"page": page.stem, "run": run, **{row[0]: row[place] for row in body}}
        for place, run in enumerate(head)
        if run and "Inductor" not in run
    ]


def _rows(rows: list[Any]) -> Rows:
    if not rows or isinstance(rows[0], dict):
        return rows
    head, *body = rows
    return [dict(zip(head, cells, strict=True)) for cells in body]


def worse(now: Values, before: Values) -> Iterator[tuple[str, float | None, float]]:
    """What is beyond the noise on the wrong side, or is not measured any more: name, value, baseline."""
    by_place = {(measure.table, measure.column): measure for measure in MEASURES}
    for name, baseline in before.items():
        measure = by_place.get((name.partition(": ")[0], name.rpartition(": ")[2]))
        if measure is None:
            continue
        value, margin = now.get(name), measure.noise * abs(baseline) + 1e-12
        if value is None or (value < baseline - margin if measure.better == "higher" else value > baseline + margin):
            yield name, value, baseline


def main(
    accept: Annotated[
        bool, typer.Option("--accept", help="what was measured last is the baseline from now on")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare the last measurements with the baselines."""
    now = measured(read_tables())
    if accept:
        BASELINES.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        typer.echo(f"{len(now)} baselines written")
        return
    before = json.loads(BASELINES.read_text())
    found = list(worse(now, before))
    if as_json:
        rows = [{"measure": name, "value": value, "baseline": baseline} for name, value, baseline in found]
        typer.echo(json.dumps({"compared": len(before), "worse": rows}, indent=2))
    else:
        typer.echo(f"{len(before)} measures compared, {len(found)} worse than their noise")
        if found:
            _print(found)
    raise typer.Exit(1 if found else 0)


def _print(found: list[tuple[str, float | None, float]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("measure", "now", "baseline"):
        table.add_column(header, overflow="fold")
    for name, value, baseline in found:
        table.add_row(name, "not measured" if value is None else f"{value:.3g}", f"{baseline:.3g}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
