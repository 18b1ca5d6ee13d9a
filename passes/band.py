"""What a condition on (b, h, i, j) says about j - i: a band, nothing at all, or something that is no band.

The condition becomes a conjunction of clauses; a clause is a disjunction of relations e <= 0, e linear in i and
j. Over 0 <= i < Sq and 0 <= j < Skv the largest value of e stands in a corner, which decides that a relation always
holds, never holds, or follows from another one, for every size. Nothing is guarded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from sgl_npu.passes.index_space import size_expression
from sgl_npu.passes.index_values import Choice, Fit, Opaque, divided_by_common_factor
from sgl_npu.runtime.sizes import Size, known

BATCH, HEAD, ROW, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "i", "j"))
COORDINATES = (BATCH, HEAD, ROW, KEY)


def coordinates(rank: int) -> tuple[sympy.Symbol, ...]:
    """The index of a tensor whose last dimensions are (b, h, i, j)."""
    further = (sympy.Symbol(f"b{n}", integer=True, nonnegative=True) for n in range(4, rank))
    return (*further, *COORDINATES[max(4 - rank, 0) :])


Side = tuple[str, sympy.Expr]  # ("lower" or "upper", bound of j - i)
Clause = tuple[sympy.Basic, ...]

_MOST_CLAUSES = 64
_LONGEST_CLAUSE = 8


@dataclass
class Band:
    """lower <= j - i <= upper; None is no bound."""

    lower: sympy.Expr | None = None
    upper: sympy.Expr | None = None

    def sides(self) -> dict[str, sympy.Expr]:
        return {name: side for name, side in vars(self).items() if side is not None}

    def take(self, sides: Sequence[Side]) -> bool:
        """Narrow it. False, and nothing taken, where two bounds cannot be put in order for every size."""
        taken = self.sides()
        for name, bound in sides:
            difference = sympy.expand(bound - taken.setdefault(name, bound))
            if not difference.is_number:
                return False
            if difference > 0 if name == "lower" else difference < 0:
                taken[name] = bound
        self.lower, self.upper = taken.get("lower"), taken.get("upper")
        return True


@dataclass(frozen=True)
class Lengths:
    """i runs over the queries and j over the keys. `shape_env` knows the symbols in them."""

    rows: Size
    keys: Size
    shape_env: Any = None
    _decided: dict[sympy.Expr, bool] = field(default_factory=dict, compare=False)
    _intervals: Fit = field(default_factory=Fit, compare=False)

    def band(self, condition: sympy.Basic) -> list[Side] | None:
        """The sides of the band that a condition says, none if it always holds, None if it says anything else."""
        fixed = {symbol: 0 for symbol, size in ((ROW, self.rows), (KEY, self.keys)) if known(size == 1)}
        try:
            clauses = _clauses(condition.subs(fixed) if fixed else condition)
        except Opaque:
            return None
        sides: list[Side] = []
        bounds, unproved = [], []
        for clause in map(self._reduced, clauses):
            side = self._side(clause[0]) if clause is not None and len(clause) == 1 else None
            if side is not None:
                sides.append(side)
                bounds.append(_bound(clause[0]))  # type: ignore[index]
            elif clause is not None:
                unproved.append(clause)
        implied = all(any(self._follows(e, x) for e in bounds for x in clause) for clause in unproved)
        return sides if implied else None

    def always(self, condition: sympy.Basic) -> bool:
        """Whether a condition is known to hold for every index and size."""
        try:
            return all(self._reduced(clause) is None for clause in _clauses(condition))
        except Opaque:
            return False

    def never(self, condition: sympy.Basic) -> bool:
        """Whether a condition is known to hold for no index, whatever the sizes."""
        try:
            clauses = [self._reduced(clause) for clause in _clauses(condition)]
        except Opaque:
            return False
        bounds = [e for clause in clauses if clause and len(clause) == 1 and (e := _bound(clause[0])) is not None]
        pairs = itertools.combinations(bounds, 2)
        return () in clauses or any(self.nonpositive(1 - one - other) for one, other in pairs)

    def _reduced(self, clause: Clause) -> Clause | None:
        """Without relations that add nothing; None if the clause always holds."""
        if len(clause) > _LONGEST_CLAUSE:
            return clause
        bounds = {x: e for x in clause if (e := _bound(x)) is not None}
        pairs = itertools.combinations(bounds.values(), 2)
        if sympy.Or(*clause) == sympy.true or any(map(self.nonpositive, bounds.values())):
            return None
        if any(self.nonpositive(one + other - 1) for one, other in pairs):  # not both e >= 1
            return None
        kept = [x for x in clause if x not in bounds or not self.nonpositive(1 - bounds[x])]
        for x in [x for x in kept if x in bounds]:
            if any(y is not x and self._follows(bounds[x], y) for y in kept):
                kept.remove(x)
        return tuple(kept)

    def _follows(self, bound: sympy.Expr, relation: sympy.Basic) -> bool:
        """Whether the relation holds wherever bound <= 0."""
        other = _bound(relation)
        return other is not None and self.nonpositive(other - bound)

    def _side(self, relation: sympy.Basic) -> Side | None:
        bound = _bound(relation)
        if bound is None:
            return None
        slope, other = sympy.diff(bound, KEY), sympy.diff(bound, ROW)
        rest = sympy.expand(bound - slope * KEY - other * ROW)
        if known(self.rows == 1):
            other = -slope
        elif known(self.keys == 1):
            slope = -other
        if rest.free_symbols & set(COORDINATES) or not _is_sum_of_products(rest):
            return None
        if (slope, other) == (1, -1):
            return "upper", -rest
        return ("lower", rest) if (slope, other) == (-1, 1) else None

    def nonpositive(self, expression: sympy.Expr) -> bool:
        """Whether an expression is at most 0 for every i, j and size."""
        if expression not in self._decided:
            self._decided[expression] = self._decide(sympy.expand(expression))
        return self._decided[expression]

    def _decide(self, expression: sympy.Expr) -> bool:
        for symbol, size in ((ROW, self.rows), (KEY, self.keys)):
            if not expression.is_polynomial(symbol):
                return False
            slope = sympy.diff(expression, symbol)
            if not slope.is_number:
                return False
            expression = expression.subs(symbol, size_expression(size) - 1 if slope > 0 else 0)
        expression = sympy.expand(expression)
        if expression.is_number:
            return bool(expression <= 0)
        if self._intervals.interval(expression)[1] <= 0:
            return True
        if self.shape_env is None or expression.free_symbols & set(COORDINATES) or not _is_sum_of_products(expression):
            return False
        return known(self.shape_env.create_symintnode(expression, hint=None) <= 0)


def _is_sum_of_products(expression: sympy.Expr) -> bool:
    """Sums and products of sizes and integers: what a graph can be given as a few nodes."""
    nodes = sympy.preorder_traversal(expression)
    return all(x.is_Symbol or x.is_Integer or x.is_Add or x.is_Mul for x in nodes)


def _clauses(condition: sympy.Basic, negated: bool = False) -> list[Clause]:
    """Clauses whose conjunction is the condition. No clause: always true. An empty clause: never."""
    if condition in (sympy.true, sympy.false):
        return [] if (condition == sympy.true) != negated else [()]
    if isinstance(condition, sympy.Not):
        return _clauses(condition.args[0], not negated)
    if isinstance(condition, sympy.Xor) and len(condition.args) <= 3:
        return _clauses(condition.to_nnf(simplify=False), negated)
    if isinstance(condition, (sympy.Eq, sympy.Ne)) and not condition.has(AppliedUndef, Choice):
        a, b = condition.args
        equal = isinstance(condition, sympy.Eq)
        pair = sympy.And(sympy.Le(a, b), sympy.Ge(a, b)) if equal else sympy.Or(sympy.Lt(a, b), sympy.Gt(a, b))
        return _clauses(pair, negated)
    if not isinstance(condition, (sympy.And, sympy.Or)):
        return [(sympy.Not(condition) if negated else condition,)]
    parts = [_clauses(x, negated) for x in condition.args]
    if isinstance(condition, sympy.And) != negated:
        clauses = [clause for part in parts for clause in part]
    else:
        clauses = [()]
        for part in parts:
            clauses = [tuple(dict.fromkeys(one + other)) for one in clauses for other in part]
            if len(clauses) > _MOST_CLAUSES:
                raise Opaque
    return list(dict.fromkeys(clauses))


def _bound(relation: sympy.Basic) -> sympy.Expr | None:
    """The e of a relation that says e <= 0 over integers, linear in i and j, its common factor taken out."""
    if not isinstance(relation, Relational) or isinstance(relation, (sympy.Eq, sympy.Ne)):
        return None
    strict = isinstance(relation, (sympy.Lt, sympy.Gt))
    bound = sympy.expand(relation.lts - relation.gts + int(strict))
    return divided_by_common_factor(bound) if bound.is_polynomial(ROW, KEY) else None
