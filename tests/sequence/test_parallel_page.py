"""docs/parallelism.md says what the code does, and its example runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from docs.parallelism import COLUMNS, KINDS, PAGE, page
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sequence import SCHEMES
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh

EXAMPLE = Path(__file__).parents[2] / "examples" / "parallel.py"


def test_the_tables_of_the_page_are_those_of_the_code():
    assert page() == PAGE.read_text(), "run python -m docs.parallelism"


def test_every_kind_of_attention_has_a_scheme():
    tables = PAGE.read_text()
    rows = [line for kind in KINDS for line in tables.splitlines() if line.startswith(f"| {kind.name} |")]
    assert len(rows) == len(KINDS)
    assert all(row.count("| no: ") < len(COLUMNS) for row in rows)


@pytest.mark.parametrize(
    ("name", "R", "U"),
    [("ulysses", 1, 2), ("ulysses", 1, 4), ("ring", 4, 1), ("ring", 2, 2), ("kv_gather", 4, 1), ("kv_gather", 2, 4)],
)
def test_the_formula_of_a_scheme_is_what_it_says_it_sends(name, R, U):
    P, S, D, Hq, Hkv = R * U, 1024, 16, 16, 8
    rows = [torch.empty(1, heads, S // P, D, dtype=torch.bfloat16, device="meta") for heads in (Hq, Hkv, Hkv)]
    layout = SequenceLayout((S,), R, U)
    mesh = SequenceMesh(Axis(R, "blocks"), Axis(U, "ulysses"), Axis(P, "whole"))
    elements = eval(SCHEMES[name].formula, {"S": S, "D": D, "Hq": Hq, "Hkv": Hkv, "P": P, "R": R, "U": U})
    assert elements * 2 == SCHEMES[name].bytes(AttentionCall(*rows), layout, layout, mesh)


@pytest.mark.slow
def test_the_example_of_the_page_runs():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    setting = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=setting, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (
        "sequence sharded over 2 x 1 ranks" in done.stdout and "at most, against the model on one rank" in done.stdout
    )
