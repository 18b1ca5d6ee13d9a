"""The totals at the top of the page: a few numbers, each with what it is of and a remark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgl_npu.compiler.html.costs import layer_rows, squares
from sgl_npu.compiler.html.numbers import bytes_text, seconds_text
from sgl_npu.compiler.trace import Trace

if TYPE_CHECKING:
    from sgl_npu.compiler.report import Report


@dataclass(frozen=True)
class Tile:
    """`state` is good, bad or neither."""

    name: str
    value: str
    note: str = ""
    state: str = ""


def tiles(report: Report) -> list[Tile]:
    return list(_tiles(report))


def _tiles(report: Report) -> Iterator[Tile]:
    sites = len(report.sites)
    kernels = Counter(site.kernel or site.op or "not captured" for site in report.sites)
    ops = ", ".join(f"{count} x {kernel}" for kernel, count in kernels.items()) or "no attention was found"
    yield Tile(
        "attentions fused",
        f"{report.fused} of {sites}",
        ops,
        "" if not sites else "good" if report.fused == sites else "bad",
    )
    if report.trace is not None:
        yield from _byte_tiles(report.trace)
    count = len(report.graphs)
    nodes = sum(graph.nodes for graph in report.graphs)
    yield Tile("graph compiled" if count == 1 else "graphs compiled", str(count), f"{nodes} nodes")
    if "passes" in report.seconds:
        total = report.seconds.get("total", 0.0)
        note = f"of {seconds_text(total)} to compile" if total else ""
        yield Tile("in passes", seconds_text(report.seconds["passes"]), note)


def _byte_tiles(trace: Trace) -> Iterator[Tile]:
    before, size_before, after, size_after = squares(trace)
    sizes = f"{bytes_text(size_before)} → {bytes_text(size_after)}"
    yield Tile("S x S buffers", f"{before} → {after}", sizes if before or after else "none before, none after")
    rows = [row for row in layer_rows(trace) if row.is_layer]
    if rows:
        row = max(rows, key=lambda row: row.count * row.before.bytes)
        note = f"{row.change or 'as before'}, {row.name}"
        yield Tile("bytes written per layer", f"{row.bytes_before} → {row.bytes_after}", note)
