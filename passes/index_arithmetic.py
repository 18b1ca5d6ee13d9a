"""What elementwise ops and sums compute from the values of their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sgl_npu.passes.index_space import Index, IndexSpace, Rule, argument, dim_of, dtype_of, shape_of, size_expression
from sgl_npu.passes.index_values import INTEGERS, Choice, Opaque, lifted, number, pick, positive_divisor, truth


def elementwise(function: Callable[..., sympy.Basic], arity: int = 2) -> Rule:
    """An op on numbers. Bool operands count as 0 and 1."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > arity:
            raise Opaque
        return lifted(function, *space.operands(node, node.args[:arity], None, index))

    return rule


def division(function: Callable[..., sympy.Basic], negative: bool = True) -> Rule:
    """A quotient or a remainder; `negative` says whether the function is torch's for negative dividends too."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        mode = node.kwargs.get("rounding_mode", "floor")
        if dtype_of(node) not in INTEGERS or mode not in ("floor", "trunc"):
            raise Opaque
        dividend, divisor = space.operands(node, node.args[:2], None, index)
        if not (negative and mode == "floor") and space.values.interval(dividend)[0] < 0:
            raise Opaque
        return lifted(lambda a, b: function(space.values, a, positive_divisor(b)), dividend, divisor)

    return rule


def clamp(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    functions = {"min": sympy.Max, "max": sympy.Min}
    given = {name: argument(node, place, name) for place, name in enumerate(functions, 1)}
    return _clamped(space, node, index, [(functions[name], x) for name, x in given.items() if x is not None])


def clamp_by(function: Callable[..., sympy.Basic]) -> Rule:
    return lambda space, node, index: _clamped(space, node, index, [(function, node.args[1])])


def _clamped(space: IndexSpace, node: fx.Node, index: Index, limits: list[tuple[Callable, Any]]) -> sympy.Basic:
    value, *bounds = space.operands(node, [node.args[0], *(x for _, x in limits)], dtype_of(node), index)
    for (function, _), bound in zip(limits, bounds, strict=True):
        value = lifted(function, value, bound)
    return value


def logic(function: Callable[..., sympy.Basic], arity: int = 2) -> Rule:
    """A connective. Bitwise ops on integers are not understood."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        operands = node.args[:arity]
        if dtype_of(node) != torch.bool:
            raise Opaque
        return function(*(truth(space.operand(x, shape_of(node), index)) for x in operands))

    return rule


def where(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    condition, yes, no = node.args
    return _chosen(space, node, index, condition, yes, no)


def masked_fill(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, condition, filled = node.args
    return _chosen(space, node, index, condition, filled, source)


def _chosen(space: IndexSpace, node: fx.Node, index: Index, condition: Any, yes: Any, no: Any) -> sympy.Basic:
    values = [space.operand(x, shape_of(node), index) for x in (yes, no)]
    fitted = [space.fit(x, node.meta["val"].dtype, node, index) for x in values]
    return pick(truth(space.operand(condition, shape_of(node), index)), *fitted)


def triangle(compare: Callable[..., sympy.Basic]) -> Rule:
    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        diagonal = size_expression(argument(node, 1, "diagonal", 0))
        zero = sympy.false if dtype_of(node) == torch.bool else sympy.Integer(0)
        return pick(compare(index[-1] - index[-2], diagonal), space.at(node.args[0], index), zero)

    return rule


def cumsum(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """The sum of the entries 0 to n of something linear in the entry's position."""
    if dtype_of(node) not in INTEGERS:
        raise Opaque
    dim, position = dim_of(node, len(index)), sympy.Dummy("position", integer=True, nonnegative=True)
    term = sympy.expand(number(space.at(node.args[0], (*index[:dim], position, *index[dim + 1 :]))))
    if not term.is_polynomial(position) or term.has(AppliedUndef, Choice):
        raise Opaque
    slope = sympy.diff(term, position)
    if slope.has(position):
        raise Opaque
    count = index[dim] + 1
    return slope * index[dim] * count / 2 + term.subs(position, 0) * count
