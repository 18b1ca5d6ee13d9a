"""The tables of benchmarks/README.md that are made from the runs on the stand-in NPU."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

Rows = list[dict[str, Any]]
Table = list[list[str]]
SHORT = {
    "npu_fused_infer_attention_score": "FIA",
    "npu_fused_infer_attention_score_v2": "FIA v2",
    "npu_fusion_attention_v3": "v3 (training op)",
}


def setting() -> str:
    versions = (f"{name} {version(name)}" for name in ("torch", "torch-npu", "transformers", "diffusers"))
    return f"{datetime.date.today()}, {', '.join(versions)}, float16, on the stand-in NPU"


def ascend_compile(rows: Rows) -> Table:
    """What compiles, into how many graphs, and is the answer right."""
    head = ["model", "attention", "compiler", "graphs for 8 lengths", "error vs eager on CPU", "attention became"]
    table = [head]
    for plain, ours in _pairs(rows):
        cells = [f"{_graphs(plain)} → {_graphs(ours)}", f"{_error(plain)} → {_error(ours)}"]
        became = f"{_attention(plain)} → {_attention(ours)}"
        table.append([plain["model"], plain["spelling"], plain["compiler"], *cells, became])
    return table


def ascend_memory(rows: Rows) -> Table:
    """What the graph has that gets to the compiler, at the first length."""
    head = ["model", "attention", "FX ops", "tensors of S x S", "MB written by attention, a site"]
    table = [head]
    for plain, ours in _pairs(row for row in rows if row["compiler"] == "npugraph_ex"):
        cells = []
        for name, scale in (("fx_ops", 1), ("square_buffers", 1), ("attention_bytes", 2**20 * plain["sites"])):
            before, after = (_fact(row, name, scale) for row in (plain, ours))
            cells.append(f"{before} → {after}")
        table.append([plain["model"], plain["spelling"], *cells])
    return table


def ascend_ge(rows: Rows) -> Table:
    """GE operators of the whole converted graph."""
    head = ["model", "attention", "GE operators", "of these compute", "ours / plain", "FusedInferAttentionScore"]
    table = [head]
    for plain, ours in _pairs(row for row in rows if row["compiler"] == "torchair"):
        counts = [
            [str(row["ge"][name]) if "ge" in row else "-" for row in (plain, ours)] for name in ("all", "compute")
        ]
        share = f"{ours['ge']['compute'] / plain['ge']['compute']:.0%}" if "ge" in plain and "ge" in ours else "-"
        fused = f"{ours['ge']['FusedInferAttentionScore']} of {ours['sites']}" if "ge" in ours else ours["error"]
        table.append([plain["model"], plain["spelling"], *(" → ".join(pair) for pair in counts), share, fused])
    return table


def ascend_layer(rows: Rows) -> Table:
    """GE operators that one more decoder layer adds."""
    table = [["model", "attention", "GE operators", "of these compute", "ours / plain, of those that compute"]]
    for plain, ours in _pairs(row for row in rows if row.get("ge_layer") or (row["who"] == "plain" and row["error"])):
        counts = [
            " → ".join(f"{row['ge_layer'][name]:g}" if "ge_layer" in row else "fails" for row in (plain, ours))
            for name in ("all", "compute")
        ]
        known = "ge_layer" in plain
        share = f"{ours['ge_layer']['compute'] / plain['ge_layer']['compute']:.0%}" if known else "-"
        table.append([plain["model"], plain["spelling"], *counts, share])
    return table


TABLES: dict[str, Callable[[Rows], Table]] = {
    "ascend_compile": ascend_compile,
    "ascend_memory": ascend_memory,
    "ascend_ge": ascend_ge,
    "ascend_layer": ascend_layer,
}


def _pairs(rows: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows that differ in "plain" and "ours" alone."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["model"], row["spelling"], row["compiler"]), {})[row["who"]] = row
    return [(pair["plain"], pair["ours"]) for pair in found.values() if len(pair) == 2]


def _graphs(row: dict[str, Any]) -> str:
    return "fails" if row["error"] else str(row["graphs"])


def _error(row: dict[str, Any]) -> str:
    return "-" if row["error"] else f"{row['worst']:.0e}"


def _attention(row: dict[str, Any]) -> str:
    if row["first"] is None:
        return row["error"]
    fused = [f"{count} {SHORT[name]}" for name, count in row["first"]["fused"].items()]
    left = [f"{row['first']['softmaxes']} decomposed"] if row["first"]["softmaxes"] else []
    failed = [f"({row['error']})"] if row["error"] else []
    return " ".join([", ".join(fused + left) or "nothing", *failed])


def _fact(row: dict[str, Any], name: str, scale: float) -> str:
    if row["first"] is None:
        return "-"
    value = row["first"][name] / scale
    return f"{value:.0f}" if scale == 1 else f"{value:.2f}"
