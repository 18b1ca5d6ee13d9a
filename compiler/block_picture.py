"""Which blocks of an attention are computed, as a picture: text for a terminal, or SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

COLUMNS = 64
# How full the upper and the lower half of a character are.
GLYPHS: dict[str, tuple[float, float]] = {
    " ": (0.0, 0.0),
    "▀": (1.0, 0.0),
    "▄": (0.0, 1.0),
    "█": (1.0, 1.0),
    "░": (0.25, 0.25),
    "▒": (0.5, 0.5),
    "▓": (0.75, 0.75),
}

_SIDE, _GAP, _LINE = 200, 16, 18  # pixels: a head's picture, between two of them, a line of text
_STYLE = "text{font:12px sans-serif;fill:#222}path{stroke:#1f4e79;fill:none}.paper{fill:#fff}.cell{fill:#e8edf3}"


def picture(selected: Tensor) -> str:
    """Blocks, bool (rows, columns), in a frame: two rows of blocks to a line, the fuller the more are computed.

    A mask of more than 64 columns is drawn smaller, a character then standing for several blocks.
    """
    columns = min(selected.size(1), COLUMNS)
    rows = max(1, round(selected.size(0) * columns / selected.size(1)))
    shares = F.adaptive_avg_pool2d(selected.float()[None], (rows, columns))[0]
    pairs = F.pad(shares, (0, 0, 0, rows % 2)).unflatten(0, (-1, 2)).transpose(1, 2).tolist()
    lines = ("".join(_glyph(upper, lower) for upper, lower in line) for line in pairs)
    edge = "─" * columns
    return "\n".join((f"┌{edge}┐", *(f"│{line}│" for line in lines), f"└{edge}┘"))


def _glyph(upper: float, lower: float) -> str:
    return min(GLYPHS, key=lambda glyph: math.dist(GLYPHS[glyph], (upper, lower)))


def svg(cells: Sequence[tuple[Tensor, str]], title: str) -> str:
    """Masks, bool (rows, columns), each under its caption, in a grid under the title."""
    across = max(1, math.ceil(math.sqrt(len(cells))))
    down = math.ceil(len(cells) / across)
    width, height = _GAP + across * (_SIDE + _GAP), _GAP + _LINE + down * (_LINE + _SIDE + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text x="{_GAP}" y="{_GAP + 8}">{html.escape(title)}</text>',
    ]
    for number, (selected, caption) in enumerate(cells):
        row, column = divmod(number, across)
        parts += _cell(selected, caption, _GAP + column * (_SIDE + _GAP), _GAP + _LINE + row * (_LINE + _SIDE + _GAP))
    return "\n".join((*parts, "</svg>", ""))


def _cell(selected: Tensor, caption: str, x: int, y: int) -> list[str]:
    rows, columns = selected.shape
    return [
        f'<text x="{x}" y="{y + 12}">{html.escape(caption)}</text>',
        f'<svg x="{x}" y="{y + _LINE}" width="{_SIDE}" height="{_SIDE}" viewBox="0 0 {columns} {rows}" '
        'preserveAspectRatio="none" shape-rendering="crispEdges">',
        f'<rect class="cell" width="{columns}" height="{rows}"/>',
        f'<path d="{_runs(selected)}"/>',
        "</svg>",
    ]


def _runs(selected: Tensor) -> str:
    """Strokes of the height of a block, one for each run of computed blocks in a row: a tenth of the size of rects."""
    path = []
    changes = F.pad(selected.int(), (1, 1)).diff(dim=1)
    for row, change in enumerate(changes):
        end = 0
        for start, stop in change.nonzero().view(-1, 2).tolist():
            path.append(f"m{start - end} 0h{stop - start}" if end else f"M{start} {row}.5h{stop - start}")
            end = stop
    return "".join(path)
