"""One attention in detail: its mask, shapes, bytes, route, schedule and graphs. Those that show the same share it."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

from sgl_npu.compiler.html import timeline
from sgl_npu.compiler.html.costs import site_bytes
from sgl_npu.compiler.html.graph_view import graph_view
from sgl_npu.compiler.html.mask_form import MaskForm, mask_form
from sgl_npu.compiler.html.mask_picture import block_pictures, mask_pictures
from sgl_npu.compiler.html.parts import Parts
from sgl_npu.compiler.html.route import route
from sgl_npu.compiler.html.templates import rendered
from sgl_npu.compiler.sparse_quality import SparseQuality
from sgl_npu.compiler.trace import SiteTrace
from sgl_npu.passes.site import SiteRecord as Site


def detail(site: Site, trace: SiteTrace | None, quality: SparseQuality | None, parts: Parts) -> int:
    """The number of the part that shows it."""
    form = mask_form(site, trace)
    text = rendered(
        "site.html.j2",
        site=site,
        form=form,
        pictures=[(parts.add_large(picture), caption) for picture, caption in _pictures(form, trace, quality)],
        quality=quality,
        origin=_origin(form, trace, quality),
        share=_share(form, trace) if quality is None else f"{quality.density:.1%} of the pairs",
        kept=_kept(trace),
        biased=site.mask.endswith(" + bias"),
        trace=trace,
        shapes=_shapes(site),
        route=route(site, trace),
        bytes=site_bytes(site, trace),
        timeline=_timeline(trace, parts),
        **_graphs(form, trace, parts),
    )  # fmt: skip
    return parts.add(Markup(text))


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


def _timeline(trace: SiteTrace | None, parts: Parts) -> dict[str, Any] | None:
    if trace is None or trace.schedule is None:
        return None
    return {"part": parts.add(timeline.timeline(trace.schedule)), "facts": timeline.facts(trace.schedule)}


def _graphs(form: MaskForm | None, trace: SiteTrace | None, parts: Parts) -> dict[str, Any]:
    before, after = ("", "") if trace is None else (trace.before, trace.after)
    sizes = None if form is None else (form.rows, form.keys)
    views = {"before": graph_view(before, after, sizes), "after": graph_view(after, before, sizes)}
    return {name: parts.add_large(view) if view else "" for name, view in views.items()}
