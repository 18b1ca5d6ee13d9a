"""The page: what of a report goes where. The templates have the words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sgl_npu.compiler.html import timeline
from sgl_npu.compiler.html.costs import layer_rows
from sgl_npu.compiler.html.detail import detail
from sgl_npu.compiler.html.numbers import bytes_text, seconds_text
from sgl_npu.compiler.html.parts import Parts
from sgl_npu.compiler.html.templates import file_text, rendered
from sgl_npu.compiler.html.totals import tiles

if TYPE_CHECKING:
    from sgl_npu.compiler.report import Report, Site

SIZE_LIMIT = 2_000_000  # bytes of the page of a hundred layers, alike or not
_TOTALS = ("total", "passes")  # of the report's seconds, sums of others


def page(report: Report, title: str = "") -> str:
    """The report as HTML. The same report gives the same page."""
    parts = Parts()
    qualities = {x.site: x for x in report.sparse_quality()} if report.measures else {}
    traces = {} if report.trace is None else report.trace.sites
    rows = [_row(site, detail(site, traces.get(site.id), qualities.get(site.id), parts)) for site in report.sites]
    return rendered(
        "page.html.j2",
        title=title or "Attention report",
        report=report,
        rows=rows,
        parts=parts,
        modules=sorted({row.layer for row in rows}, key=_natural),
        ops=sorted({row.op for row in rows}),
        tiles=tiles(report),
        layers=[] if report.trace is None else layer_rows(report.trace),
        seconds=_seconds(report),
        gathers=Counter(gather for part in report.parallel for gather in part.gathers).items(),
        bytes_text=bytes_text,
        style=file_text("style.css"),
        script=file_text("script.js"),
        assumed=f"{timeline.OPERATIONS_PER_SECOND / 1e12:.0f} TFLOP/s a rank computes and "
        f"{timeline.BYTES_PER_SECOND / 1e9:.0f} GB/s a rank sends",
    )  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """A line of the table; `detail` is the number of the part that has the rest."""

    site: Site
    module: str
    layer: str
    op: str
    detail: int


def _row(site: Site, number: int) -> _Row:
    module = site.module or site.source or "-"
    return _Row(site, module, _starred(module), site.op or "not captured", number)


def _starred(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", module)


def _natural(text: str) -> list[Any]:
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.split(r"(\d+)", text)]


def _seconds(report: Report) -> list[dict[str, Any]]:
    """Each step's seconds with the width of its bar in percent; steps of no account are left out."""
    steps = {name: spent for name, spent in report.seconds.items() if name not in _TOTALS and spent >= 1e-4}
    most = max(steps.values(), default=1.0)
    return [{"name": name, "text": seconds_text(x), "width": 100 * x / most} for name, x in steps.items()]
