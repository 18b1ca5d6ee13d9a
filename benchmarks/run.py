"""Measure and write the tables of benchmarks/README.md: `python benchmarks/run.py [table ...]`."""

from __future__ import annotations

import datetime
import json
import platform
import re
import sys
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from measure import TABLES, Table  # noqa: E402


def main(names: list[str]) -> None:
    unknown = set(names) - set(TABLES)
    if unknown:
        sys.exit(f"unknown table {', '.join(sorted(unknown))}: choose from {', '.join(TABLES)}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    results = HERE / "results.json"
    stored = json.loads(results.read_text()) if results.exists() else {}
    for name in names or list(TABLES):
        print(f"measuring {name} ...", flush=True)
        rows = TABLES[name]()
        print(markdown(rows), flush=True)
        stored[name] = {"measured": _setting(), "rows": rows}
    results.write_text(json.dumps(stored, indent=1) + "\n")
    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(), stored))


def fill(text: str, stored: dict) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- end -->` replaced by the table of that name."""
    for name, table in stored.items():
        block = f"<!-- {name} -->\n{markdown(table['rows'])}\n\nMeasured: {table['measured']}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
    return text


def markdown(rows: Table) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _setting() -> str:
    """Date, versions and processor, without which a number says nothing."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main(sys.argv[1:])
