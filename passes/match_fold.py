"""Products in which query heads that share a key head are rows: one batched product serves a group of heads.

    q (B, G, N, S, D) → view (B * G, N * S, D)   bmm   k^T (B * G, D, T)   → view (B, G, N, S, T)

Einsum writes grouped and multi-query attention this way, with the heads before the positions or after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sgl_npu.passes.axes import Atom, Axes, places, regrouped
from sgl_npu.runtime.sizes import Size, known

Lead = tuple[Size, Size]


@dataclass(frozen=True)
class Fold:
    """Rows of a product that are `heads` heads times `rows` positions, heads first where `heads_first`."""

    heads: Size
    rows: Size
    heads_first: bool

    def matches(self, other: Fold | None) -> bool:
        return other is not None and known(self.heads == other.heads) and known(self.rows == other.rows)

    def unfolded(self, dims: Axes) -> Axes | None:
        """(…, rows, columns) with the folded heads put behind the leading dimensions, rows being positions alone."""
        sizes = (self.heads, self.rows) if self.heads_first else (self.rows, self.heads)
        parts = regrouped([dims[-2]], sizes)
        if parts is None:
            return None
        heads, rows = parts if self.heads_first else parts[::-1]
        return [*dims[:-2], heads, rows, dims[-1]]

    def folded(self, dims: Axes, kv_lead: Lead) -> Axes | None:
        """(B, H, rows, columns) as the product has them: (…, folded rows, columns)."""
        lead = regrouped(dims[:2], (*kv_lead, self.heads))
        if lead is None:
            return None
        rows = [*lead[2], *dims[2]] if self.heads_first else [*dims[2], *lead[2]]
        return [*lead[:2], rows, dims[3]]


def fold_between(narrow: Axes, wide: Axes) -> Fold | None:
    """The fold whose product has the dimensions `narrow` where the scores have `wide`, both made of the same atoms."""
    if len(narrow) < 2 or len(wide) < 3 or places([narrow[-1]]) != places([wide[-1]]):
        return None
    wide = _cut_alike(wide, narrow)
    rows, together = places([wide[-2]]), places([narrow[-2]])
    inside = [atom for atom in _atoms(wide[:-2]) if any(_is_part(atom, place) for place in together)]
    outside = [atom for atom in _atoms(wide[:-2]) if atom not in inside]
    if not inside or not rows or not all(any(_starts(row, place) for place in together) for row in rows):
        return None
    in_line = [atom.place for atom in _atoms(wide[:-2])] == [atom.place for atom in (*outside, *inside)]
    if not in_line or [atom.place for atom in outside] != _ordered(narrow[:-2], outside):
        return None
    heads, positions = [_position(atom.place, together) for atom in inside], [_position(row, together) for row in rows]
    if heads != sorted(heads) or positions != sorted(positions):
        return None
    if not (heads[-1] < positions[0] or positions[-1] < heads[0]):
        return None
    size = math.prod(atom.size for atom in inside), math.prod(atom.size for atom in wide[-2])
    return Fold(*size, heads[-1] < positions[0])


def folded_lead(wide: Sequence[Size], fold: Fold) -> tuple[Lead, Lead] | None:
    """(B, H) and (B, Hkv) where the leading dimensions of the scores end in the heads of a fold, or hold them last."""
    have: Size = 1
    outer = list(wide)
    while not known(have == fold.heads):
        if not outer:
            return None
        size = outer.pop()
        if known(have == 1) and known(size > fold.heads) and known(size % fold.heads == 0):
            outer.append(size // fold.heads)
            break
        have = have * size
    batch, kv_heads = (1, 1) if not outer else (math.prod(outer[:-1]), outer[-1]) if len(outer) > 1 else (outer[0], 1)
    return (batch, kv_heads * fold.heads), (batch, kv_heads)


def _atoms(dims: Axes) -> list[Atom]:
    return [atom for dim in dims for atom in dim]


def _cut_alike(dims: Axes, others: Axes) -> Axes:
    """Dimensions in pieces as fine as those of other dimensions, where these are made of the same atoms."""

    def pieces(atom: Atom) -> list[Atom]:
        found = [part for part in _atoms(others) if _starts(part.place, atom.place)]
        return sorted(found, key=lambda part: part.place) or [atom]

    return [[part for atom in dim for part in pieces(atom)] for dim in dims]


def _starts(place: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return place[: len(whole)] == whole


def _is_part(atom: Atom, whole: tuple[int, ...]) -> bool:
    return _starts(atom.place, whole)


def _position(place: tuple[int, ...], together: Sequence[tuple[int, ...]]) -> tuple[int, tuple[int, ...]]:
    """Where an atom stands in the folded rows: by the atom it is part of, then within it."""
    number = next(n for n, whole in enumerate(together) if _starts(place, whole))
    return number, place


def _ordered(lead: Axes, outside: Sequence[Atom]) -> list[tuple[int, ...]]:
    """The places of the product's leading dimensions, cut as finely as `outside` has them."""
    found: list[tuple[int, ...]] = []
    for whole in places(lead):
        found += sorted(atom.place for atom in outside if _starts(atom.place, whole))
    return found
