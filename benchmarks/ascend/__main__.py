"""`python -m benchmarks.ascend`: every model under Ascend's compilers, alone and with ours, on the stand-in NPU.

Needs the environment of `make test-npu`. Writes benchmarks/ascend/results.json and the tables of benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.ascend.tables import TABLES, setting
from benchmarks.readme import fill

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
COMPILERS = ("npugraph_ex", "torchair")


def main(
    only: Annotated[str, typer.Option(help="models, separated by commas; all others keep their results")] = "",
    compiler: Annotated[str, typer.Option(help=f"{' | '.join(COMPILERS)}, or both")] = "",
) -> None:
    """Measure, then write the tables."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch_npu does not load here: the programs have the stand-in
    from benchmarks.ascend.models import MODELS

    names = only.split(",") if only else list(MODELS)
    compilers = [compiler] if compiler else list(COMPILERS)
    if unknown := (set(names) - set(MODELS)) | (set(compilers) - set(COMPILERS)):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join((*MODELS, *COMPILERS))}")
    stored = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [row for row in stored if row["model"] not in names or row["compiler"] not in compilers]
    for which in compilers:
        for name in names:
            for row in _measured(name, which):
                rows.append(row)
                print(json.dumps(row), flush=True)
    rows.sort(key=lambda row: (list(MODELS).index(row["model"]), row["spelling"], row["compiler"], row["who"]))
    RESULTS.write_text(json.dumps({"measured": setting(), "rows": rows}, indent=1) + "\n")
    readme = ROOT / "benchmarks" / "README.md"
    tables = {name: {"measured": setting(), "rows": table(rows)} for name, table in TABLES.items()}
    readme.write_text(fill(readme.read_text(), tables))


def _measured(name: str, compiler: str) -> Iterator[dict[str, Any]]:
    """The lines of one program: a process can use one of the compilers, and a model's failure is its own."""
    flags = ["--ge"] if compiler == "torchair" else []
    command = [sys.executable, "-m", "stand_in", *flags, "-m", "benchmarks.ascend.measure", name, compiler]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests" / "ascend"), str(ROOT)))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    for line in result.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")


if __name__ == "__main__":
    typer.run(main)
