"""`python -m benchmarks.coverage`: run the cases, keep one line of JSON for each, say what was found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.coverage.case import Setting
from benchmarks.coverage.document import document
from benchmarks.coverage.registry import all_cases
from benchmarks.coverage.runner import run_cases
from benchmarks.coverage.settings import BACKENDS, MODES
from benchmarks.coverage.summary import line, summary
from benchmarks.coverage.versions import versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLATFORMS = ("cpu", "npu")
DOCS = Path(__file__).parents[2] / "docs"


def main(
    only: Annotated[str, typer.Option(help="regular expression on case names, as hf/llama/eager+pad")] = "",
    mode: Annotated[str, typer.Option(help=" | ".join(MODES))] = "static",
    dtype: Annotated[str, typer.Option(help=" | ".join(DTYPES))] = "fp32",
    platform: Annotated[str, typer.Option(help=" | ".join(PLATFORMS))] = "cpu",
    backend: Annotated[str, typer.Option(help=" | ".join(BACKENDS))] = "sgl_npu",
    seq: Annotated[int, typer.Option(min=4, help="tokens per sequence")] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time")] = 1,
    timeout: Annotated[float, typer.Option(help="seconds per case")] = 180.0,
    out: Annotated[Path | None, typer.Option("--json", help="write a line of JSON per case")] = None,
    resume: Annotated[bool, typer.Option(help="skip the cases that --json holds already")] = False,
    write_docs: Annotated[list[Path] | None, typer.Option(help="write a page of docs/ from runs instead")] = None,
    page: Annotated[str, typer.Option(help="which page --write-docs writes")] = "coverage.md",
    show_list: Annotated[bool, typer.Option("--list", help="only list the cases")] = False,
) -> None:
    """Measure how much attention the backend finds."""
    for value, allowed in ((mode, MODES), (dtype, DTYPES), (platform, PLATFORMS), (backend, BACKENDS)):
        if value not in allowed:
            typer.echo(f"error: {value!r}: choose from {', '.join(allowed)}", err=True)
            raise typer.Exit(2)
    if write_docs:
        (DOCS / page).write_text(document(record for path in write_docs for record in _read(path)))
        typer.echo(f"wrote {page}")
        return
    names = [name for name in all_cases() if re.search(only, name)]
    if show_list:
        typer.echo("\n".join(names))
        return
    done = _read(out) if out and resume else []
    names = [name for name in names if name not in {record["case"] for record in done}]
    if out and not resume:
        out.write_text("")
    console, records, made_with = Console(), list(done), versions()
    for number, record in enumerate(
        run_cases(names, Setting(batch, seq, DTYPES[dtype]), backend, platform, mode, jobs, timeout), start=1
    ):
        record |= {"versions": made_with, "batch": batch}
        records.append(record)
        console.print(f"[{number}/{len(names)}] {line(record)}", markup=False, highlight=False, soft_wrap=True)
        if out:
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    typer.echo(summary(records))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    typer.run(main)
