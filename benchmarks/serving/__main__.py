"""`python -m benchmarks.serving [FAMILY ...]`: generate() with compiled models of every family, beside eager.

Writes benchmarks/serving/results.json, family by family, and the tables of docs/serving.md.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.coverage.versions import versions
from benchmarks.serving.families import build, families
from benchmarks.serving.generation import CACHES, EagerFails, compare, plain_graphs
from benchmarks.serving.page import write_page

RESULTS = Path(__file__).with_name("results.json")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="families; all if none is named")] = None,
    missing: Annotated[bool, typer.Option(help="leave out what has a result")] = False,
    measure: Annotated[bool, typer.Option(help="measure before the page is written")] = True,
) -> None:
    """Measure, then write the tables."""
    if unknown := set(names or ()) - set(families()):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(families())}")
    warnings.simplefilter("ignore")
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"families": {}}
    for name in (names or list(families())) if measure else ():
        if missing and name in stored["families"]:
            continue
        stored["families"][name] = {cache: _row(name, cache) for cache in CACHES}
        stored["measured"] = versions()
        print(name, json.dumps(stored["families"][name]), flush=True)
        stored["families"] = {key: stored["families"][key] for key in families() if key in stored["families"]}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    write_page(stored)


def _row(name: str, cache: str) -> dict[str, Any]:
    """What `compare` found, or where it failed: in eager, which is not ours, or compiled."""
    model = build(name)
    try:
        found = asdict(compare(model, cache))
    except Exception as error:
        torch._dynamo.reset()
        text = str(error) if isinstance(error, EagerFails) else f"{type(error).__name__}: {error}"
        return {"error": text.strip().partition("\n")[0]}
    if found["graphs"] > 2:
        found["plain_graphs"] = plain_graphs(model, cache)
    return found


if __name__ == "__main__":
    typer.run(main)
