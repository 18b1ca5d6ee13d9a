"""Measure and write the tables of benchmarks/README.md: `python benchmarks/run.py [table ...]`."""

from __future__ import annotations

import datetime
import json
import platform
import sys
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from measure import GPU_TABLES, TABLES  # noqa: E402
from readme import fill, markdown  # noqa: E402


def main(names: list[str]) -> None:
    tables = TABLES | (GPU_TABLES if torch.cuda.is_available() else {})
    unknown = set(names) - set(tables)
    if unknown:
        sys.exit(f"unknown table {', '.join(sorted(unknown))}: choose from {', '.join(tables)}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    results = HERE / "results.json"
    stored = json.loads(results.read_text()) if results.exists() else {}
    for name in names or list(tables):
        print(f"measuring {name} ...", flush=True)
        rows = tables[name]()
        print(markdown(rows), flush=True)
        stored[name] = {"measured": _setting(name in GPU_TABLES), "rows": rows}
    results.write_text(json.dumps(stored, indent=1) + "\n")
    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(), stored))


def _setting(on_gpu: bool) -> str:
    """Date, versions and processor, without which a number says nothing."""
    if on_gpu:
        return f"{datetime.date.today()}, torch {torch.__version__}, {torch.cuda.get_device_name()}"
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main(sys.argv[1:])
