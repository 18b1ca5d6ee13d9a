"""Whether a row may be left without any key: what a mask, all parts of it and the band, says of its emptiest row.

"never"      a key is known that every row may attend, or the band alone decides: it reaches a key from every row
"some"       a row, for every size and whatever the data, may attend nothing: the first ones of a bottom-right triangle
             with more rows than keys
"possible"   anything else: data decides (a padding mask), or the sizes, or it is not known
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sympy

from sgl_npu.passes.band import KEY, ROW, Band, Lengths
from sgl_npu.passes.index_space import size_expression

NEVER, POSSIBLE, SOME = "never", "possible", "some"


def empty_rows(conditions: Sequence[sympy.Basic | None], band: Band, lengths: Lengths) -> str:
    """The answer for a band and all conditions; None among them is one of which nothing is known."""
    rows, keys = size_expression(lengths.rows), size_expression(lengths.keys)
    reached = _reached(rows, keys, band)
    known = [condition for condition in conditions if condition is not None]
    everything = sympy.And(*known, *(_side(*side) for side in band.sides().items()))
    if lengths.nonpositive(1 - rows) and (
        lengths.nonpositive(keys)
        or any(lengths.nonpositive(distance + 1) for distance in reached)
        or any(lengths.never(everything.subs(ROW, row)) for row in (0, rows - 1))
    ):
        return SOME
    if len(known) < len(conditions) or not lengths.nonpositive(1 - keys):
        return POSSIBLE
    if all(x == sympy.true for x in known):
        return NEVER if all(lengths.nonpositive(-distance) for distance in reached) else POSSIBLE
    for witness in _witnesses(rows, keys, band):
        inside = lengths.nonpositive(-witness) and lengths.nonpositive(witness - keys + 1)
        if inside and lengths.always(everything.subs(KEY, witness)):
            return NEVER
    return POSSIBLE


def _side(name: str, bound: sympy.Expr) -> sympy.Basic:
    return bound <= KEY - ROW if name == "lower" else bound >= KEY - ROW


def _reached(rows: sympy.Expr, keys: sympy.Expr, band: Band) -> list[sympy.Expr]:
    """Numbers none of which is negative exactly where the band has a key for every row."""
    distances = [] if band.upper is None else [band.upper]
    if band.lower is not None:
        distances.append(keys - rows - band.lower)
    if band.lower is not None and band.upper is not None:
        distances.append(band.upper - band.lower)
    return distances


def _witnesses(rows: sympy.Expr, keys: sympy.Expr, band: Band) -> Iterator[sympy.Expr]:
    """Keys that a row is likely to attend: itself, aligned to either end; the ends; the sides of the band."""
    yield ROW
    yield ROW + keys - rows
    yield sympy.Integer(0)
    yield keys - 1
    yield from (ROW + side for side in band.sides().values())
