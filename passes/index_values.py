"""What index space computes with: integers, conditions, and choices between them. Exact, or refused with `Opaque`.

An integer op of torch is the op of mathematics followed by a wrap to its dtype. `Fit.fit` leaves a value alone where it
surely fits, and wraps it into an unknown function where it may not: nothing is claimed about a value that overflowed.
Floats take part as constants that their dtype holds exactly (0, 1, -inf, the smallest float), never as positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    """a <= b, taken apart where a or b is a minimum or a maximum."""
    return _ordered(sympy.Le, a, b)


def below(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    return _ordered(sympy.Lt, a, b)


def _ordered(relation: Callable[..., sympy.Basic], a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    if isinstance(a, (sympy.Max, sympy.Min)):
        join = sympy.And if isinstance(a, sympy.Max) else sympy.Or
        return join(*(_ordered(relation, x, b) for x in a.args))
    if isinstance(b, (sympy.Max, sympy.Min)):
        join = sympy.And if isinstance(b, sympy.Min) else sympy.Or
        return join(*(_ordered(relation, a, x) for x in b.args))
    return relation(a, b)


def positive_divisor(divisor: sympy.Basic) -> sympy.Integer:
    """Division and remainder are understood for positive numbers only."""
    if not divisor.is_Integer or divisor <= 0:
        raise Opaque
    return divisor


class Fit:
    """Intervals of integer expressions, and what they become in a dtype. `bounds` holds those of unknown functions."""

    def __init__(self) -> None:
        self.bounds: dict[type, Interval] = {}
        self._intervals: dict[sympy.Basic, Interval] = {}

    def unknown(self, name: str, dtype: torch.dtype, arguments: tuple[sympy.Basic, ...]) -> sympy.Basic:
        """An unknown value of an integer dtype, or 0 or 1 for bools."""
        function = sympy.Function(name, integer=True)
        self.bounds[function] = (0, 1) if dtype == torch.bool else _limits(dtype)
        return function(*arguments)

    def fit(self, value: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
        """The value as a tensor of this dtype holds it."""
        if dtype == torch.bool:
            return truth(value)
        if dtype in INTEGERS:
            return lifted(lambda x: self._wrapped(x, dtype), number(value))
        return lifted(lambda x: _exact(x, dtype), number(value))

    def _wrapped(self, value: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
        if value.is_infinite or (value.is_Rational and not value.is_Integer):
            raise Opaque
        (low, high), (least, most) = self.interval(value), _limits(dtype)
        if least <= low and high <= most:
            return value
        return self.unknown(f"wrapped_{str(dtype).removeprefix('torch.')}", dtype, (value,))

    def interval(self, value: sympy.Basic) -> Interval:
        """Bounds of an integer expression, whatever its symbols are."""
        if value not in self._intervals:
            self._intervals[value] = self._interval(value)
        return self._intervals[value]

    def _interval(self, value: sympy.Basic) -> Interval:
        if value.is_Rational:
            return math.floor(value), math.ceil(value)
        if value.is_Symbol:
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


def _exact(value: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
    """A constant that the float dtype holds without rounding."""
    if value in (sympy.oo, -sympy.oo):
        return value
    info = torch.finfo(dtype)
    if not value.is_Integer or abs(value) > int(info.max):
        raise Opaque
    significant = abs(int(value)) // (abs(int(value)) & -abs(int(value)) or 1)
    if significant >= 2 / info.eps:
        raise Opaque
    return value
