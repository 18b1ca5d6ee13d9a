"""What index space computes with: integers, conditions, and choices between them. Exact, or refused with `Opaque`.

An integer op of torch is the op of mathematics followed by a wrap to its dtype. `Fit.fit` leaves a value alone where it
surely fits, and wraps it into an unknown function where it may not: nothing is claimed about a value that overflowed.
Floats take part as constants that their dtype holds exactly (0, 1, -inf, the smallest float), and as integers so small
that their dtype holds all of them: positions below 2^24 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.utils._sympy.functions import FloorDiv, PythonMod
from torch.utils._sympy.functions import Where as Choice

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

LONGEST = 2**28  # no tensor dimension is longer: what int32 positions, and three bits of arithmetic on them, rely on
_LARGEST_NUMBER = 2**60  # no integer that a graph gets as an input is larger, unless it is a dimension
_MOST_BRANCHES = 16

# sympy calls a plain symbol Boolean too.
_CONDITION = (sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction, sympy.logic.boolalg.BooleanAtom)

Interval = tuple[int, int]
_ANYTHING: Interval = (-(2**200), 2**200)


class Opaque(Exception):
    """This value is not understood."""


def is_condition(value: sympy.Basic) -> bool:
    return isinstance(value, _CONDITION)


def truth(value: sympy.Basic) -> sympy.Basic:
    """A number as a condition."""
    return value if is_condition(value) else lifted(lambda x: sympy.Ne(x, 0), value)


def number(value: sympy.Basic) -> sympy.Basic:
    """A condition as 0 or 1."""
    return pick(value, sympy.Integer(1), sympy.Integer(0)) if is_condition(value) else value


def pick(condition: sympy.Basic, yes: sympy.Basic, no: sympy.Basic) -> sympy.Basic:
    """`yes` where the condition holds, else `no`: both numbers or both conditions."""
    if yes == no:
        return yes
    if not is_condition(yes):
        return Choice(condition, yes, no)
    if yes in (sympy.true, sympy.false):
        return sympy.Or(condition, no) if yes == sympy.true else sympy.And(sympy.Not(condition), no)
    if no in (sympy.true, sympy.false):
        return sympy.Or(sympy.Not(condition), yes) if no == sympy.true else sympy.And(condition, yes)
    return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))


def lifted(function: Callable[..., sympy.Basic], *values: sympy.Basic) -> sympy.Basic:
    """A function of numbers applied inside choices."""
    if math.prod(_branches(value) for value in values) > _MOST_BRANCHES:
        raise Opaque
    return _lifted(function, values)


def _lifted(function: Callable[..., sympy.Basic], values: tuple[sympy.Basic, ...]) -> sympy.Basic:
    for place, value in enumerate(values):
        if isinstance(value, Choice):
            condition, yes, no = value.args
            before, after = values[:place], values[place + 1 :]
            return pick(condition, _lifted(function, (*before, yes, *after)), _lifted(function, (*before, no, *after)))
    return function(*values)


def _branches(value: sympy.Basic) -> int:
    return _branches(value.args[1]) + _branches(value.args[2]) if isinstance(value, Choice) else 1


def at_most(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """a <= b, taken apart where a minimum or a maximum is a term of a or b."""
    return _ordered(sympy.Le, a, b)


def below(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    return _ordered(sympy.Lt, a, b)


def equal(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    split = a.has(sympy.Max, sympy.Min) or b.has(sympy.Max, sympy.Min)
    return sympy.And(at_most(a, b), at_most(b, a)) if split and not _is_infinite(a, b) else sympy.Eq(a, b)


def _is_infinite(*values: sympy.Basic) -> bool:
    return any(x.has(sympy.oo, -sympy.oo, sympy.nan) for x in values)


def _ordered(relation: Callable[..., sympy.Basic], a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    if _is_infinite(a, b):
        return relation(a, b)
    difference = sympy.expand(a - b)
    for term, factor in difference.as_coefficients_dict().items():
        if isinstance(term, (sympy.Max, sympy.Min)):
            join = sympy.And if isinstance(term, sympy.Max) == (factor > 0) else sympy.Or
            rest = difference - factor * term
            return join(*(_ordered(relation, factor * x + rest, sympy.Integer(0)) for x in term.args))
    strict = relation is sympy.Lt
    return sympy.Le(divided_by_common_factor(difference + int(strict)), 0)


def divided_by_common_factor(bound: sympy.Expr) -> sympy.Expr:
    """The simplest e for which e <= 0 says what bound <= 0 says, over integers."""
    terms = sympy.expand(bound).as_coefficients_dict()
    constant = terms.pop(sympy.S.One, sympy.Integer(0))
    if not terms or not all(x.is_Integer for x in (*terms.values(), constant)):
        return bound
    factor = math.gcd(*(int(n) for n in terms.values()))
    return sympy.Add(*(x * (n / factor) for x, n in terms.items())) + sympy.ceiling(constant / factor)


def positive_divisor(divisor: sympy.Basic) -> sympy.Integer:
    """Division and remainder are understood for positive numbers only."""
    if not divisor.is_Integer or divisor <= 0:
        raise Opaque
    return divisor


def recomposed(value: sympy.Basic) -> sympy.Basic:
    """A sum with x // k * k + x % k in it written as x."""
    if not value.is_Add or not value.has(FloorDiv) or not value.has(PythonMod):
        return value
    terms = value.as_coefficients_dict()
    for remainder in [x for x in terms if isinstance(x, PythonMod)]:
        x, k = remainder.args
        quotient = FloorDiv(x, k)
        if terms[remainder] * k == terms.get(quotient, 0):
            value = value - terms[remainder] * (remainder + k * quotient - x)
    return value


WRAPPED = "wrapped_"  # before the name of a dtype, the function of a number that may be too large for it


class Fit:
    """Intervals of integer expressions, and what they become in a dtype.

    `bounds` holds the intervals of unknown functions, `limits` those of symbols of which more is known than usual.
    """

    def __init__(
        self, bounds: dict[type, Interval] | None = None, limits: Mapping[sympy.Symbol, Interval] | None = None
    ) -> None:
        self.bounds: dict[type, Interval] = {} if bounds is None else bounds
        self.limits = limits or {}
        self._intervals: dict[sympy.Basic, Interval] = {}

    def unknown(self, name: str, dtype: torch.dtype, arguments: tuple[sympy.Basic, ...]) -> sympy.Basic:
        """An unknown value of an integer dtype, or 0 or 1 for bools."""
        function = sympy.Function(name, integer=True)
        self.bounds[function] = (0, 1) if dtype == torch.bool else _limits(dtype)
        return function(*arguments)

    def fit(
        self, value: sympy.Basic, dtype: torch.dtype, limits: Mapping[sympy.Symbol, Interval] | None = None
    ) -> sympy.Basic:
        """The value as a tensor of this dtype holds it, while symbols are within limits."""
        if dtype == torch.bool:
            return truth(value)
        if dtype in INTEGERS:
            return lifted(lambda x: self._wrapped(x, dtype), number(value))
        within = self.within(limits or {})
        return lifted(lambda x: within._exact(x, dtype), number(value))

    def within(self, limits: Mapping[sympy.Symbol, Interval]) -> Fit:
        return Fit(self.bounds, limits) if limits else self

    def _wrapped(self, value: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
        if value.is_infinite or (value.is_Rational and not value.is_Integer):
            raise Opaque
        (low, high), (least, most) = self.interval(value), _limits(dtype)
        if least <= low and high <= most:
            return value
        return self.unknown(f"{WRAPPED}{str(dtype).removeprefix('torch.')}", dtype, (value,))

    def _exact(self, value: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
        """A value that the float dtype holds without rounding, and so its ops."""
        if value in (sympy.oo, -sympy.oo):
            return value
        info = torch.finfo(dtype)
        whole = 2 / info.eps  # every integer up to this one
        if not value.is_Integer:
            if value.is_integer and max(map(abs, self.interval(value))) <= whole:
                return value
            raise Opaque
        size = abs(int(value))
        significant = size // (size & -size or 1)
        if size > int(info.max) or significant >= whole:
            raise Opaque
        return value

    def divided(self, value: sympy.Basic, divisor: sympy.Integer) -> tuple[sympy.Basic, sympy.Basic]:
        """Quotient, rounded down, and remainder by a positive number. Multiples of it are taken out of a sum."""
        terms = sympy.expand(value).as_coefficients_dict()
        constant = terms.pop(sympy.S.One, sympy.Integer(0))
        multiples = sympy.Add(*(x * n / divisor for x, n in terms.items() if n % divisor == 0))
        multiples += constant // divisor
        rest = sympy.Add(constant % divisor, *(x * n for x, n in terms.items() if n % divisor != 0))
        low, high = self.interval(rest)
        if low >= 0 and high < divisor:
            return multiples, rest
        return FloorDiv(value, divisor), PythonMod(value, divisor)

    def interval(self, value: sympy.Basic) -> Interval:
        """Bounds of an integer expression, whatever its symbols are."""
        if value not in self._intervals:
            self._intervals[value] = self._interval(value)
        return self._intervals[value]

    def _interval(self, value: sympy.Basic) -> Interval:
        if value.is_Rational:
            return math.floor(value), math.ceil(value)
        if value.is_Symbol:
            if value in self.limits:
                return self.limits[value]
            return (0, LONGEST) if value.is_nonnegative else (-_LARGEST_NUMBER, _LARGEST_NUMBER)
        if isinstance(value, AppliedUndef):
            return self.bounds.get(value.func, _ANYTHING)
        if isinstance(value, PythonMod) and value.args[1].is_Integer and value.args[1] > 0:
            return 0, int(value.args[1]) - 1
        if isinstance(value, FloorDiv) and value.args[1].is_Integer and value.args[1] > 0:
            low, high = self.interval(value.args[0])
            return low // int(value.args[1]), high // int(value.args[1])
        if value.is_Pow and value.exp.is_Integer and 1 <= value.exp <= 4:
            return _product([self.interval(value.base)] * int(value.exp))
        parts = [self.interval(x) for x in value.args[isinstance(value, Choice) :] if not is_condition(x)]
        lows, highs = [low for low, _ in parts], [high for _, high in parts]
        if value.is_Add:
            return sum(lows), sum(highs)
        if value.is_Mul:
            return _product(parts)
        if isinstance(value, Choice):
            return min(lows), max(highs)
        if isinstance(value, (sympy.Max, sympy.Min)):
            best = max if isinstance(value, sympy.Max) else min
            return best(lows), best(highs)
        return _ANYTHING


def _product(parts: list[Interval]) -> Interval:
    low, high = 1, 1
    for a, b in parts:
        corners = (low * a, low * b, high * a, high * b)
        low, high = min(corners), max(corners)
    return low, high


def _limits(dtype: torch.dtype) -> Interval:
    info = torch.iinfo(dtype)
    return info.min, info.max
