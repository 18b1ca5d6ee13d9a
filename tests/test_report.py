"""Reports as text, as data, merged, and as a coverage contract."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import sgl_npu
from sgl_npu.compiler.report import GraphReport, Report, Site, merge
from sgl_npu.compiler.report_table import render, terminal_width
from sgl_npu.passes.parallel import ParallelReport

OP = "npu.npu_fused_infer_attention_score"


def site(number: int, module: str, **changes) -> Site:
    facts = {
        "op": OP, "kernel": "ascend_fa", "fused": True, "mask": "causal", "query": ("1", "8", "s0", "64"),
        "key": ("1", "4", "s0", "64"), "value": ("1", "4", "s0", "64"), "dtype": "bfloat16",
    }  # fmt: skip
    return Site(number, "scaled_dot_product_attention", module, "model.py:7", **{**facts, **changes})


UNFUSED = {
    "op": "aten (decomposed)",
    "fused": False,
    "refusals": [("ascend_fa", "softcap = 50.0: the kernel has no softcap")],
}


def report(*sites: Site) -> Report:
    return Report("npu", "eager", list(sites), [GraphReport("inference", "return", 3)], seconds={"select": 0.25})


def rows(text: str, start: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.strip().startswith(start)]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_the_table_says_where_what_and_why_not():
    text = str(report(site(0, "model.layers.0.self_attn", **UNFUSED)))
    for part in (
        "model.layers.0.self_attn", "(1, 8, s0, 64)", "(1, 4, s0, 64)", "bfloat16", "causal",
        "aten (decomposed)",
        "no", "ascend_fa", "softcap = 50.0: the kernel has no softcap", "0 of 1 fused: 1 x aten (decomposed)",
        "1: inference (3 nodes)", "select 0.25", "platform npu, inner eager",
    ):  # fmt: skip
        assert part in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 140


def test_layers_that_differ_in_their_number_alone_share_a_row():
    text = str(report(*(site(n, f"model.layers.{n}.self_attn") for n in range(24))))
    assert "model.layers.*.self_attn  x24" in text
    assert " 0-23 " in text
    assert text.count("self_attn") == 1


def test_alternating_layers_make_two_rows():
    text = str(report(*(site(n, f"layers.{n}", mask=("causal", "full")[n % 2]) for n in range(6))))
    assert " 0-4/2 " in text and " 1-5/2 " in text
    assert text.count("layers.*  x3") == 2


@pytest.mark.parametrize(
    "change",
    [
        {"mask": "full"},
        {"dtype": "float16"},
        UNFUSED,
        {"source": "other.py:1"},
        {"key": ("1", "1", "s0", "64")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_layers_that_differ_in_anything_else_do_not(change):
    other = site(1, "layers.1")
    for name, value in change.items():
        setattr(other, name, value)
    assert "*" not in str(report(site(0, "layers.0"), other))


def test_only_the_part_of_a_path_that_differs_is_starred():
    text = str(report(site(0, "stages.2.blocks.0"), site(1, "stages.2.blocks.1")))
    assert "stages.2.blocks.*  x2" in text


def test_a_site_outside_modules_is_named_by_its_line():
    assert "model.py:7" in str(report(site(0, "")))


def test_brackets_in_a_reason_are_not_markup():
    refused = site(0, "a", refusals=[("k", "shape [bold] is not [1, 2]")])
    assert "shape [bold] is not [1, 2]" in str(report(refused))


def test_an_empty_report_says_that_no_graph_was_reached():
    assert "no graph reached the backend" in str(Report())


def test_a_graph_without_attention_says_so():
    assert "no attention was found" in str(report())


def test_merging_numbers_the_sites_through_and_leaves_the_parts_alone():
    parts = [report(site(0, "a"), site(1, "b")), report(site(0, "c"))]
    whole = merge(parts)
    assert [(s.id, s.module) for s in whole.sites] == [(0, "a"), (1, "b"), (2, "c")]
    assert len(whole.graphs) == 2 and whole.seconds == {"select": 0.5}
    assert parts[1].sites[0].id == 0


RING = {"scheme": "ring", "sent": "131072", "collectives": "ring - 1 shifts"}


def shared(*sites: Site, **facts) -> Report:
    return replace(report(*sites), parallel=[ParallelReport(grid="4 x 2", **facts)])


def test_each_site_shows_its_scheme_and_what_a_rank_sends():
    text = str(shared(*(site(n, f"layers.{n}", **RING) for n in range(2)), site(2, "cross", scheme="local", sent="0")))
    assert rows(text, "0-1  ring") == [["0-1", "ring", "131,072", "ring - 1 shifts"]]
    assert rows(text, "2    local") == [["2", "local", "0"]]


def test_bytes_of_a_length_that_is_a_symbol_stay_a_formula():
    assert "1024*s0" in str(shared(site(0, "a", **{**RING, "sent": "1024*s0"})))


def test_sites_of_different_schemes_do_not_share_a_row():
    assert "layers.*" not in str(shared(site(0, "layers.0", **RING), site(1, "layers.1", scheme="kv_gather")))


def test_the_grid_and_what_is_gathered_stand_above_the_sites():
    gather = ("sort (model.py:9)", "('1', '4096', '64')", "1048576")
    text = str(shared(site(0, "layers.0", **RING), gathers=[gather, gather]))
    lines = text.splitlines()
    assert lines[0] == "sequence sharded over 4 x 2 ranks (blocks x ulysses)"
    assert rows(text, "sort") == [["sort (model.py:9)", "x2", "(1, 4096, 64)", "1,048,576"]]
    assert text.index("sort") < text.index("layers.0")


def test_why_nothing_was_sharded_stands_above_the_sites():
    text = str(shared(site(0, "a"), refused="no attention has more than one query row"))
    reason = "no attention has more than one query row"
    assert text.splitlines()[0] == f"not sharded over 4 x 2 ranks (blocks x ulysses): {reason}"
    assert "scheme" not in text


def test_a_report_of_one_rank_says_nothing_of_ranks():
    text = str(report(site(0, "a")))
    assert "ranks" not in text and "scheme" not in text and "gathered" not in text


NARROW = shared(
    site(0, "layers.0", **RING), site(1, "layers.1", **RING),
    site(2, "cross", refusals=[("ascend_fa", "a reason"), ("reference", "of so many words that " * 9)]),
    gathers=[("sort (model.py:9)", "('1', '4096', '64')", "1048576")],
)  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 119])
def test_in_few_columns_each_row_of_sites_is_a_block(width):
    text = render(NARROW, width)
    assert max(map(len, text.splitlines())) <= width
    blocks = text[text.index("\n0-1  layers.*  x2\n") :].split("\n\n")
    for part in ("op ", OP, "query ", "(1, 8, s0, 64)", "fused ", "scheme ", "131,072", "ring - 1 shifts"):
        assert part in blocks[0], part
    assert blocks[1].startswith("2  cross\n") and "scheme" not in blocks[1]
    assert rows(blocks[1], "refused by") == [["refused by", "ascend_fa"], ["refused by", "reference"]]
    assert "sort (model.py:9)" in text and "graphs   1: inference" in text


def test_tables_and_blocks_say_the_same():
    words = [set(render(NARROW, width).replace("─", " ").split()) for width in (80, 400)]
    assert words[0] - {"#", "where"} == words[1] - {"#", "where"}


@pytest.mark.parametrize("report", [Report(), report()])
def test_reports_of_nothing_fit_few_columns(report):
    assert render(report, 60).count("\n\n") == 0


@pytest.mark.parametrize(("tty", "columns", "expected"), [(True, "77", 77), (True, "200", 200), (False, "77", 140)])
def test_a_terminal_has_its_own_width_and_a_pipe_that_of_all_pipes(monkeypatch, tty, columns, expected):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: tty))
    assert terminal_width() == expected and str(NARROW) == render(NARROW, expected)


def test_seconds_are_the_sums_and_the_steps_that_took_longest():
    spent = {
        "capture": 0.3, "mask": 0.05, "layout": 0.004, "match": 0.2, "select": 0.1, "passes": 0.36,
        "inner": 0.0, "total": 1.25,
    }  # fmt: skip
    given = replace(report(), seconds=spent)
    assert str(given).splitlines()[-1] == (
        "seconds  passes 0.36, inner 0.00, total 1.25; most in capture 0.30, match 0.20, select 0.10"
    )
    assert given.to_dict()["seconds"] == spent
    assert str(replace(given, seconds={})).splitlines()[-1] == "seconds  none"


def test_a_report_survives_json():
    found = json.loads(json.dumps(report(site(0, "a", **UNFUSED)).to_dict()))
    assert found["counts"] == {"aten (decomposed)": 1}
    assert found["sites"][0]["refusals"] == [["ascend_fa", "softcap = 50.0: the kernel has no softcap"]]


MIXED = report(site(0, "layers.0"), site(1, "layers.1", **UNFUSED))
FUSED = report(site(0, "layers.0"))


@pytest.mark.parametrize(
    ("found", "contract"),
    [
        (FUSED, {}), (FUSED, {"fused": "all", "graphs": 1, "ops": {OP: 1}}), (MIXED, {"fused": 1}),
        (MIXED, {"fused": None}), (Report(), {"fused": None, "graphs": 0}),
    ],
)  # fmt: skip
def test_a_kept_contract_is_silent(found, contract):
    sgl_npu.expect(found, **contract)


@pytest.mark.parametrize(
    ("found", "contract", "message"),
    [
        (MIXED, {}, r"1 of 2 sites are fused, 2 were expected\n.*layers.1 model.py:7.*\n.*softcap = 50.0"),
        (MIXED, {"fused": 2}, "1 of 2"),
        (Report(), {}, "no attention was found"),
        (merge([FUSED, FUSED]), {"graphs": 1}, "reached 2 graphs, at most 1"),
        (MIXED, {"fused": None, "ops": {OP: 2}}, f"1 sites ended in {OP}, 2 were expected; found 1 x"),
    ],
)  # fmt: skip
def test_a_broken_contract_lists_what_is_missing_and_why(found, contract, message):
    with pytest.raises(sgl_npu.CoverageError, match=message):
        sgl_npu.expect(found, **contract)


def test_a_backward_graph_counts_with_its_forward():
    trained = report(site(0, "a"))
    trained.graphs.append(GraphReport("backward", "return", 5))
    sgl_npu.expect(trained, graphs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fused": "most"}, "fused = 'most': should be 'all', a number"),
        ({"fused": True}, "fused = True"),
        ({"fused": -1}, "fused = -1"),
        ({"graphs": "one"}, "graphs = 'one': should be a number"),
        ({"ops": [OP]}, "ops = .*should map"),
        ({"ops": {OP: "4"}}, "'4'.*should map"),
        ({"report": "text"}, "report = 'text': expected a Report"),
    ],
)
def test_a_bad_contract_names_value_rule_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        sgl_npu.expect(**{"report": FUSED, **arguments})


def test_importing_sgl_npu_is_light():
    heavy = ("transformers", "diffusers", "typer", "rich", "torch._inductor.compile_fx")
    code = f"import sys, sgl_npu; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
