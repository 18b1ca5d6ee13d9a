"""What a mask that is no band is called in the report.

documents   ids[b, i] == ids[b, j] of unknown ids        chunks   i // c == j // c, or any ids that are positions
prefix      a band, or the first keys: j <= i or j < n    tensor   anything else
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy.core.function import AppliedUndef

from sgl_npu.passes.band import KEY, ROW
from sgl_npu.passes.index_values import Choice

TENSOR = "tensor"


def words(conditions: Iterable[sympy.Basic | None]) -> str:
    """One word per kind of condition, joined; None is a condition of which nothing is known."""
    return " & ".join(sorted({TENSOR if x is None else word(x) for x in conditions}, key=lambda x: (x == TENSOR, x)))


def word(condition: sympy.Basic) -> str:
    if isinstance(condition, sympy.Eq) and not condition.has(Choice) and _compares_ids(condition):
        return "documents" if condition.has(AppliedUndef) else "chunks"
    if isinstance(condition, sympy.Or) and len(condition.args) == 2:
        slopes = sorted(tuple(map(str, _slopes(x))) for x in condition.args)
        return "prefix" if slopes == [("-1", "1"), ("0", "1")] else TENSOR
    return TENSOR


def _slopes(relation: sympy.Basic) -> tuple[sympy.Expr, sympy.Expr] | tuple[()]:
    """The factors of i and j in the e of a relation e <= 0 or e < 0, if e is linear in them."""
    if not isinstance(relation, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return ()
    bound = sympy.expand(relation.lts - relation.gts)
    return (sympy.diff(bound, ROW), sympy.diff(bound, KEY)) if bound.is_polynomial(ROW, KEY) else ()


def _compares_ids(condition: sympy.Eq) -> bool:
    """Each term of the difference of the sides depends on the row or the key, not on both; on each one term does."""
    terms = sympy.Add.make_args(sympy.expand(condition.lhs - condition.rhs))
    symbols = [x.free_symbols & {ROW, KEY} for x in terms]
    return all(len(found) < 2 for found in symbols) and {ROW} in symbols and {KEY} in symbols
