"""The tables of benchmarks/README.md that are made from the runs on gloo ranks."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
Table = list[list[str]]
NO_VALUE = "-"


def setting() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "diffusers"))
    return f"{datetime.date.today()}, {versions}, gloo, 1 thread a rank, {_processor()}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def sequence_efficiency(rows: Rows) -> Table:
    """A line for each attention, a column for each scheme."""
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    table = [["mask", "dtype", "S", "pages", "1 rank, CPU s", *schemes]]
    for (causal, dtype, length, pages), group in _grouped(rows, "causal", "dtype", "length", "pages"):
        found = {row["scheme"]: f"{row['efficiency']:.2f}" for row in group}
        first = ["causal" if causal else "none", dtype, str(length), pages, f"{group[0]['alone_seconds']:.2f}"]
        table.append([*first, *(found.get(scheme, NO_VALUE) for scheme in schemes)])
    return table


def sequence_models(rows: Rows) -> Table:
    """A line for each model and combination of degrees: the worst error of all lengths, what one graph exchanges."""
    table = [["model", "ranks", "degrees", "attentions", "collectives a graph", "predicted KB", "error fp32", "bf16"]]
    for (model, ranks, _), group in _grouped(rows, "model", "ranks", "degrees"):
        errors = (_worst([row for row in group if row["dtype"] == dtype]) for dtype in ("float32", "bfloat16"))
        first = group[0]
        exchanged = ", ".join(f"{count} {name}" for name, count in first.get("collectives", {}).items())
        predicted = f"{first['predicted_bytes'] / 1024:.0f}" if first.get("predicted_bytes") else NO_VALUE
        cells = [model, str(ranks), _degrees(first["degrees"]), str(first["attentions"]), exchanged or NO_VALUE]
        table.append([*cells, predicted, *errors])
    return table


def sequence_memory(rows: Rows) -> Table:
    """A line for each length and combination of degrees: the peak of the worst rank beside that of one alone."""
    table = [["model", "S", "ranks", "degrees", "1 rank, MB", "worst rank, MB", "of 1 rank"]]
    for row in rows:
        cells = [row["model"], str(row["length"]), str(row["ranks"]), _degrees(row["degrees"])]
        if "failure" in row:
            table.append([*cells, NO_VALUE, f"fails: {row['failure']}", NO_VALUE])
        else:
            alone, worst = row["alone_mb"], max(row["peak_mb"])
            table.append([*cells, f"{alone:.1f}", f"{worst:.1f}", f"{worst / alone:.0%}"])
    return table


TABLES: dict[str, Callable[[Rows], Table]] = {
    "sequence_efficiency": sequence_efficiency,
    "sequence_models": sequence_models,
    "sequence_memory": sequence_memory,
}


def _grouped(rows: Rows, *names: str) -> list[tuple[tuple[Any, ...], Rows]]:
    """Rows that agree in some fields, in the order of their first."""
    found: dict[str, tuple[tuple[Any, ...], Rows]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        found.setdefault(repr(key), (key, []))[1].append(row)
    return list(found.values())


def _degrees(degrees: dict[str, int]) -> str:
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items()) or "none"


def _worst(rows: Rows) -> str:
    if failures := [row["failure"] for row in rows if "failure" in row]:
        return f"fails: {failures[0]}"
    if not rows:
        return NO_VALUE
    differ = "" if all(row["same_graph"] for row in rows) else " (graphs differ)"
    return f"{max(row['error'] for row in rows):.0e}{differ}"
