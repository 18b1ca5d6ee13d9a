"""The comparison of what was measured with the baselines."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import check

NAME = "speed: Llama, float32: eager / ours"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("1.18x", 1.18), ("0.8 %", 0.8), ("4.9e-03", 4.9e-3), ("3 of 4", 0.75), ("0 of 0", None), ("1 (1)", 1.0),
        (2, 2.0), ("", None), ("OK", None),
    ],
)  # fmt: skip
def test_the_number_of_a_cell(cell, expected):
    assert check.number(cell) == expected


@pytest.mark.parametrize(
    ("name", "baseline", "value", "is_worse"),
    [
        (NAME, 1.0, 0.86, False),
        (NAME, 1.0, 0.84, True),
        (NAME, 1.0, 9.0, False),
        (NAME, 1.0, None, True),
        ("demo: Wan, cpu, float32: attentions fused", 1.0, 0.99, True),
        ("demo: Wan, cpu, float32: graphs (eager backend)", 1.0, 2.0, True),
        ("compile_time: SDPA, 24: ours", 0.8, 1.5, False),
        ("compile_time: SDPA, 24: ours", 0.8, 1.7, True),
    ],
)
def test_what_is_beyond_the_noise_is_worse(name, baseline, value, is_worse):
    now = {} if value is None else {name: value}
    assert list(check.worse(now, {name: baseline})) == ([(name, value, baseline)] if is_worse else [])


def test_rows_are_named_by_what_they_measured():
    rows = [{"model": "Llama", "dtype": "float32", "eager / ours": "1.10x", "plain Inductor / ours": "1.00x"}]
    assert check.measured({"speed": rows}) == {NAME: 1.1, "speed: Llama, float32: plain Inductor / ours": 1.0}


def test_every_measure_is_in_the_last_measurements():
    found = check.measured(check.read_tables())
    assert all(
        any(name.startswith(f"{x.table}: ") and name.endswith(f": {x.column}") for name in found)
        for x in check.MEASURES
    )


def test_what_is_stored_is_not_worse_than_the_baselines():
    before = json.loads(check.BASELINES.read_text())
    assert before and not list(check.worse(check.measured(check.read_tables()), before)), (
        "make bench-check says what is"
    )


def test_a_regression_is_exit_code_1(monkeypatch, tmp_path):
    app = Typer()
    app.command()(check.main)
    monkeypatch.setattr(
        check,
        "read_tables",
        lambda: {"demo": [{"model": "Wan", "platform": "cpu", "dtype": "f", "attentions fused": "5 of 6"}]},
    )
    monkeypatch.setattr(check, "BASELINES", tmp_path / "baselines.json")
    assert CliRunner().invoke(app, ["--accept"]).exit_code == 0
    assert CliRunner().invoke(app, []).exit_code == 0
    check.BASELINES.write_text(json.dumps({"demo: Wan, cpu, f: attentions fused": 1.0}))
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)["worse"][0]["value"] == pytest.approx(5 / 6)
