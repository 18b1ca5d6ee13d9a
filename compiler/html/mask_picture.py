"""The mask of an attention as SVG: queries downwards, keys to the right, at the proportions of the real sizes.

filled    may be attended           hatched   the band allows it, data decides
empty     never                     shades    cells of which a part may be attended
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby

import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from sgl_npu.compiler.html.mask_form import MaskForm
from sgl_npu.compiler.sparse_quality import SparseQuality
from sgl_npu.compiler.trace import Raster, SiteTrace

_SIDE, _LEAST, _SMALL = 232, 22, 146  # pixels of the longer side, of the shorter at least, of the longer beside others
_STAIRS = 128  # rows up to which every row is a step
HEADS, _CELLS = 4, 64


def mask_pictures(form: MaskForm, trace: SiteTrace | None) -> list[tuple[Markup, str]]:
    """The pictures of a site's mask, each with a caption: one, or one for each sample where data differs."""
    rasters = _rasters(trace)
    if not form.data or not rasters:
        return [(_framed(form, _band(form, "maybe" if form.data else "kept"), _SIDE), "")]
    side = _SIDE if len(rasters) == 1 else _SMALL
    return [(_framed(form, _clipped(form, _cells(raster.lines.split("\n"), form)), side), raster.caption)
            for raster in rasters]  # fmt: skip


def _rasters(trace: SiteTrace | None) -> list[Raster]:
    """What its formula says of the mask, else what was seen of it; samples that are alike are one."""
    if trace is None:
        return []
    if trace.raster is not None:
        return [trace.raster]
    alike = {raster.lines for raster in trace.seen}
    return [Raster("", trace.seen[0].lines)] if len(alike) == 1 else trace.seen


def block_pictures(found: SparseQuality) -> list[tuple[Markup, str]]:
    """The computed blocks of the first heads, in the order of tokens that the kernel gets."""
    pictures = []
    for head in range(min(HEADS, found.blocks.size(1))):
        density, recall = found.density_per_head[0, head], found.recall_per_head[0, head]
        lines = _levels(found.blocks[0, head])
        form = MaskForm(len(lines), len(lines[0]), None, None, True)
        caption = f"head {head}: {float(density):.0%} computed, recall {float(recall):.3f}"
        pictures.append((_framed(form, _cells(lines, form), _SMALL), caption))
    return pictures


def _levels(blocks: Tensor) -> list[str]:
    sizes = min(blocks.size(0), _CELLS), min(blocks.size(1), _CELLS)
    shares = F.adaptive_avg_pool2d(blocks.float()[None], sizes)[0]
    return ["".join(map(str, line)) for line in (shares * 4).round().int().tolist()]


def _framed(form: MaskForm, content: Markup, side: int) -> Markup:
    longer = max(form.rows, form.keys)
    width, height = (max(_LEAST, round(side * size / longer)) for size in (form.keys, form.rows))
    frame = Markup(
        '<svg class="mask" width="{w}" height="{h}" viewBox="0 0 {keys} {rows}" preserveAspectRatio="none" role="img"'
        ' aria-label="mask of {rows} queries by {keys} keys"><rect class="never" width="{keys}" height="{rows}"/>'
    )
    return frame.format(w=width, h=height, keys=form.keys, rows=form.rows) + content + Markup("</svg>")


def _band(form: MaskForm, kind: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, _outline(form))


def _clipped(form: MaskForm, content: Markup) -> Markup:
    """What is drawn within the band, and its outline."""
    outline = _outline(form)
    name = "clip-" + hashlib.sha256(outline.encode()).hexdigest()[:8]
    clip = Markup('<clipPath id="{0}"><path d="{1}"/></clipPath><path class="outline" d="{1}"/>').format(name, outline)
    return clip + Markup('<g clip-path="url(#{})">').format(name) + content + Markup("</g>")


def _outline(form: MaskForm) -> str:
    """The band as the path of an area: a step for every row of a short sequence, its corners for a long one."""
    lower, upper = form.bounds
    rows, keys = form.rows, form.keys

    def side(row: float, shift: int) -> float:
        return min(max(row + shift, 0), keys)

    if rows <= _STAIRS:
        spans = [(row, side(row, lower), side(row, upper + 1)) for row in range(rows)]
        left = [(x, y) for row, start, _ in spans for x, y in ((start, row), (start, row + 1))]
        right = [(x, y) for row, _, end in reversed(spans) for x, y in ((end, row + 1), (end, row))]
    else:
        bends = {0, rows, *(at for at in (-lower, keys - lower, -upper - 1, keys - upper - 1) if 0 < at < rows)}
        left = [(side(row, lower), row) for row in sorted(bends)]
        right = [(side(row, upper + 1), row) for row in sorted(bends, reverse=True)]
    points = [point for point, _ in groupby([*left, *right])]
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z"


def _cells(lines: Sequence[str], form: MaskForm) -> Markup:
    """Cells of a raster, stretched over the whole mask: a path for each level."""
    frame = Markup('<svg width="{}" height="{}" viewBox="0 0 {} {}" preserveAspectRatio="none">')
    parts = [frame.format(form.keys, form.rows, len(lines[0]), len(lines))]
    for level in sorted({*"".join(lines)} - {"0"}):
        parts.append(Markup('<path class="cells" opacity="{:g}" d="{}"/>').format(int(level) / 4, _areas(lines, level)))
    return Markup("").join(parts) + Markup("</svg>")


def _areas(lines: Sequence[str], level: str) -> str:
    """The cells of a level as rectangles: a run of cells, as far down as the lines are equal."""
    path, at, row = [], (0, 0), 0
    for line, same in groupby(lines):
        height, start = len(list(same)), 0
        for value, run in groupby(line):
            width = len(list(run))
            if value == level:
                path.append(f"m{start - at[0]} {row - at[1]}h{width}v{height}h-{width}z")
                at = start, row
            start += width
        row += height
    return "".join(path)
