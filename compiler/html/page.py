"""The page: what of a report goes where. The templates have the words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from sgl_npu.compiler.html import timeline
from sgl_npu.compiler.html.costs import layer_rows, site_bytes
from sgl_npu.compiler.html.graph_view import graph_view
from sgl_npu.compiler.html.mask_form import MaskForm, mask_form
from sgl_npu.compiler.html.mask_picture import block_pictures, mask_pictures
from sgl_npu.compiler.html.numbers import bytes_text, seconds_text
from sgl_npu.compiler.html.route import route
from sgl_npu.compiler.html.totals import tiles
from sgl_npu.compiler.sparse_quality import SparseQuality
from sgl_npu.compiler.trace import SiteTrace

if TYPE_CHECKING:
    from sgl_npu.compiler.report import Report, Site

SIZE_LIMIT = 2_000_000  # bytes of the page of a hundred layers, alike or not
LARGE_LIMIT = 1_500_000  # of pictures and graphs together; those of further sites are left out
_TOTALS = ("total", "passes")  # of the report's seconds, sums of others


def page(report: Report, title: str = "") -> str:
    """The report as HTML. The same report gives the same page."""
    parts = _Parts()
    qualities = {x.site: x for x in report.sparse_quality()} if report.measures else {}
    traces = {} if report.trace is None else report.trace.sites
    rows = [_row(site, traces.get(site.id), qualities.get(site.id), parts) for site in report.sites]
    return _environment().get_template("page.html.j2").render(
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
        style=_file("style.css"),
        script=_file("script.js"),
        assumed=f"{timeline.OPERATIONS_PER_SECOND / 1e12:.0f} TFLOP/s a rank computes and "
        f"{timeline.BYTES_PER_SECOND / 1e9:.0f} GB/s a rank sends",
    )  # fmt: skip


@dataclass
class _Parts:
    """What several sites may show: each distinct one stands in the page once, and sites name it by its number."""

    found: dict[Markup, int] = field(default_factory=dict)
    large_bytes: int = 0
    left_out: int = 0

    def add(self, content: Markup) -> int:
        return self.found.setdefault(content, len(self.found))

    def add_large(self, content: Markup) -> int | None:
        """None where the page has as much of that as it may."""
        if content not in self.found:
            size = len(content.encode())
            if self.large_bytes + size > LARGE_LIMIT:
                self.left_out += 1
                return None
            self.large_bytes += size
        return self.add(content)


@dataclass(frozen=True)
class _Row:
    """A line of the table; `detail` is the number of the part that has the rest."""

    site: Site
    module: str
    layer: str
    op: str
    detail: int


def _row(site: Site, trace: SiteTrace | None, quality: SparseQuality | None, parts: _Parts) -> _Row:
    form = mask_form(site, trace)
    detail = _environment().get_template("site.html.j2").render(
        site=site,
        form=form,
        pictures=[(parts.add_large(picture), caption) for picture, caption in _pictures(form, trace, quality)],
        quality=quality,
        origin=_origin(form, trace, quality),
        share=_share(form, trace) if quality is None else f"{quality.density:.1%} of the pairs",
        kept=_kept(trace),
        trace=trace,
        shapes=_shapes(site),
        route=route(site, trace),
        bytes=site_bytes(site, trace),
        timeline=_timeline(trace, parts),
        **_graphs(form, trace, parts),
    )  # fmt: skip
    module = site.module or site.source or "-"
    return _Row(site, module, _starred(module), site.op or "not captured", parts.add(Markup(detail)))


def _pictures(
    form: MaskForm | None, trace: SiteTrace | None, quality: SparseQuality | None
) -> list[tuple[Markup, str]]:
    if quality is not None:
        return block_pictures(quality)
    return [] if form is None else mask_pictures(form, trace)


def _origin(form: MaskForm | None, trace: SiteTrace | None, quality: SparseQuality | None) -> str:
    """Where the picture comes from."""
    if quality is not None:
        rows, columns = quality.block_shape
        return f"blocks of {rows} queries by {columns} keys that were computed in the call that was run"
    if form is None:
        return ""
    if not form.data:
        return "proved, for every length; drawn at the sizes of this call"
    if trace is not None and trace.raster is not None:
        return "proved: the condition below, drawn at the sizes of this call"
    if trace is not None and trace.sequences:
        return f"{len(trace.sequences)} sequences end to end, as long as they were in the call that was run"
    decided = "drawn as it was in the call that was run" if trace is not None and trace.seen else "which nobody saw"
    return f"the band is proved; which of its pairs are allowed is decided by data, {decided}"


def _share(form: MaskForm | None, trace: SiteTrace | None) -> str:
    """How much of all pairs the band has."""
    if form is None or not form.rows * form.keys or (trace is not None and trace.packed):
        return ""
    share = form.pairs / (form.rows * form.keys)
    if form.data:
        return f"the band has {share:.1%} of the pairs" if share < 1 else ""
    return f"{share:.1%} of the pairs"


def _kept(trace: SiteTrace | None) -> str:
    """What the shape of the tensor that is left says of it."""
    found = re.fullmatch(r"b8\[(\d+), 1, 1, \d+\]", "" if trace is None else trace.mask_kept)
    if found is None:
        return ""
    return "the tensor says of each key whether it may be attended" + (", sample by sample" if found[1] != "1" else "")


def _shapes(site: Site) -> list[tuple[str, str]]:
    named = zip(("query", "key", "value"), site.shapes, strict=True)
    return [(name, f"({', '.join(shape)})") for name, shape in named if shape]


def _timeline(trace: SiteTrace | None, parts: _Parts) -> dict[str, Any] | None:
    if trace is None or trace.schedule is None:
        return None
    return {"part": parts.add(timeline.timeline(trace.schedule)), "facts": timeline.facts(trace.schedule)}


def _graphs(form: MaskForm | None, trace: SiteTrace | None, parts: _Parts) -> dict[str, Any]:
    before, after = ("", "") if trace is None else (trace.before, trace.after)
    sizes = None if form is None else (form.rows, form.keys)
    views = {"before": graph_view(before, after, sizes), "after": graph_view(after, before, sizes)}
    return {name: parts.add_large(view) if view else "" for name, view in views.items()}


def _starred(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", module)


def _natural(text: str) -> list[Any]:
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.split(r"(\d+)", text)]


def _seconds(report: Report) -> list[dict[str, Any]]:
    """Each step's seconds with the width of its bar in percent; steps of no account are left out."""
    steps = {name: spent for name, spent in report.seconds.items() if name not in _TOTALS and spent >= 1e-4}
    most = max(steps.values(), default=1.0)
    return [{"name": name, "text": seconds_text(x), "width": 100 * x / most} for name, x in steps.items()]


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(_file)
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _file(name: str) -> str:
    return files("sgl_npu.compiler.html").joinpath(name).read_text(encoding="utf-8")
