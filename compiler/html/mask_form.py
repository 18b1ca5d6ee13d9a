"""The form of a mask in numbers: sizes and band of a site, from its trace or, without one, from the report's words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sgl_npu.compiler.trace import SiteTrace
from sgl_npu.lowering.sequence.schedule import area
from sgl_npu.passes.site import SiteRecord


@dataclass(frozen=True)
class MaskForm:
    """`rows` queries and `keys` keys with lower <= j - i <= upper, None for no bound; `data`: a tensor decides too."""

    rows: int
    keys: int
    lower: int | None
    upper: int | None
    data: bool

    @property
    def bounds(self) -> tuple[int, int]:
        """The band with both sides, cut to what there is."""
        lower = 1 - self.rows if self.lower is None else max(self.lower, 1 - self.rows)
        upper = self.keys - 1 if self.upper is None else min(self.upper, self.keys - 1)
        return lower, upper

    @property
    def pairs(self) -> int:
        """How many pairs the band allows."""
        return max(0, area(self.rows, self.keys, self.lower, self.upper))


def mask_form(site: SiteRecord, trace: SiteTrace | None) -> MaskForm | None:
    """None where the sizes are symbols of which nobody knows the value, or the mask is not known."""
    if trace is not None and len(trace.query) == 4:
        return MaskForm(trace.query[2], trace.key[2], trace.lower, trace.upper, bool(trace.mask_node))
    if len(site.query) == 3:
        return _packed_form(site, trace)
    sizes = site.query[-2:-1], site.key[-2:-1]
    if not all(size and size[0].isdigit() for size in sizes) or not site.mask:
        return None
    rows, keys = (int(size[0]) for size in sizes)
    words = site.mask.removesuffix(" + bias").split(" & ")
    band = _band(words[0], rows, keys)
    data = len(words) > 1 or band is None
    return MaskForm(rows, keys, *(band or (None, None)), data)


def _band(word: str, rows: int, keys: int) -> tuple[int | None, int | None] | None:
    """The band that a word of the report says; None for no band."""
    if word == "full":
        return None, None
    if word == "causal":
        return None, 0
    if word == "causal (bottom-right)":
        return None, keys - rows
    found = re.fullmatch(r"band\((-?\d+|-inf), (-?\d+|inf)\)", word)
    if found is None:
        return None
    lower, upper = (None if "inf" in x else int(x) for x in found.groups())
    return lower, upper


def _packed_form(site: SiteRecord, trace: SiteTrace | None) -> MaskForm | None:
    """Sequences end to end: where each of them ends is data."""
    if trace is not None and trace.sequences:
        rows, keys = (sum(pair[side] for pair in trace.sequences) for side in (0, 1))
        return MaskForm(rows, keys, None, None, True)
    sizes = site.query[0], site.key[0]
    if len(site.key) == 4 or not all(size.isdigit() for size in sizes):  # paged: of keys it is known where they may be
        return None
    return MaskForm(int(sizes[0]), int(sizes[1]), None, None, True)
