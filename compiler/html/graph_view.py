"""The graph around a site, before and after, with the lines that differ and the large buffers marked."""

from __future__ import annotations

import re

from markupsafe import Markup

_ATTENTION = re.compile(
    r"= (sgl_npu\.(packed_)?attention|aten\._?(safe_)?softmax|npu\.npu_\w*(attention|infer)\w*"
    r"|sgl_npu\.\w*attention\w*|aten\.\w*(scaled_dot_product|flash)\w*|flex_attention)\("
)


def graph_view(text: str, other: str, sizes: tuple[int, int] | None) -> Markup:
    """The lines of `text`: those that `other` has not are marked, tensors of the size of scores too."""
    there = {_nameless(line) for line in other.splitlines()}
    square = None if sizes is None or min(sizes) < 2 else re.compile(rf"\[(.*, )?{sizes[0]}, {sizes[1]}\]")
    return Markup("").join(_line(line, there, square) for line in text.splitlines())


def _line(line: str, there: set[str], square: re.Pattern[str] | None) -> Markup:
    name, colon, rest = line.partition(": ")
    kind, equals, call = rest.partition(" = ")
    shape = Markup('<i class="sq">{}</i>') if square is not None and square.search(kind) else Markup("<i>{}</i>")
    text = Markup("{}{}").format(name, colon) + shape.format(kind) + Markup("{}{}").format(equals, call)
    kinds = ["own"] * (_nameless(line) not in there) + ["attention"] * (_ATTENTION.search(line) is not None)
    return (
        Markup('<span class="{}">{}</span>').format(" ".join(kinds), text)
        if kinds
        else Markup("<span>{}</span>").format(text)
    )


def _nameless(line: str) -> str:
    """A line without what counts other lines: names of nodes."""
    rest = line.partition(": ")[2]
    return re.sub(r"(?<=[(\[ ])[a-z_]+\d*(?=[,)\]])", "_", rest)
