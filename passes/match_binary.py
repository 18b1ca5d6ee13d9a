"""Numbers made of a bool tensor by arithmetic: (1 - mask.float()) * -1e9 is 0 where the mask holds, -1e9 elsewhere."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from sgl_npu.passes.constants import CASTS, number
from sgl_npu.passes.fx_ops import NEGATIONS, VIEWS, adds_leading_ones, aten

_ARITHMETIC: dict[object, Callable[[float, float], float]] = {
    aten.add.Tensor: operator.add,
    aten.add.Scalar: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.sub.Scalar: operator.sub,
    aten.rsub.Scalar: lambda a, b: b - a,
    aten.mul.Tensor: operator.mul,
    aten.mul.Scalar: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.div.Scalar: operator.truediv,
}
_COMPARISONS: dict[object, Callable[[float, float], bool]] = {
    aten.eq.Scalar: operator.eq,
    aten.ne.Scalar: operator.ne,
    aten.lt.Scalar: operator.lt,
    aten.gt.Scalar: operator.gt,
    aten.le.Scalar: operator.le,
    aten.ge.Scalar: operator.ge,
}
_TRIANGLES = (aten.tril.default, aten.triu.default)
_DEEPEST = 12


@dataclass(frozen=True)
class Binary:
    """`yes` where `condition` holds, or is not 0, `no` elsewhere; `shaping` are the views between, outermost first."""

    condition: fx.Node
    yes: float
    no: float
    shaping: tuple[fx.Node, ...] = ()

    def mapped(self, function: Callable[[float], float]) -> Binary:
        return Binary(self.condition, float(function(self.yes)), float(function(self.no)), self.shaping)


def binary(node: object, shaping: tuple[object, ...] = (), depth: int = 0) -> Binary | None:
    """What a node is made of if it is two numbers by a condition. `shaping` are the ops that count as views."""
    if not isinstance(node, fx.Node) or depth > _DEEPEST or not isinstance(node.meta.get("val"), torch.Tensor):
        return None

    def inner(x: object) -> Binary | None:
        return binary(x, shaping, depth + 1)

    if node.target in _TRIANGLES and (entry := number(node.args[0])) is not None:
        return Binary(node, entry, 0.0)
    if node.target in CASTS and node.args[0].meta["val"].dtype == torch.bool:
        return inner(node.args[0]) or Binary(node.args[0], 1.0, 0.0)
    if node.target in CASTS:
        found = inner(node.args[0])
        return None if found is None else _cast(found, node.meta["val"].dtype)
    if node.target in VIEWS and adds_leading_ones(node):
        return inner(node.args[0])
    if node.target in shaping:
        found = inner(node.args[0])
        return None if found is None else Binary(found.condition, found.yes, found.no, (node, *found.shaping))
    if node.target in NEGATIONS:
        found = inner(node.args[0])
        return None if found is None else found.mapped(lambda x: not x)
    if node.target in (aten.masked_fill.Scalar, aten.where.self):
        return _chosen(node, inner)
    return _computed(node, inner)


def _computed(node: fx.Node, inner: Callable[[object], Binary | None]) -> Binary | None:
    compute = _ARITHMETIC.get(node.target) or _COMPARISONS.get(node.target)
    if compute is None or len(node.args) != 2 or node.kwargs:
        return None
    one, other = node.args
    left, right = number(one), number(other)
    found = inner(other if left is not None else one)
    if found is None or (left is None) == (right is None):
        return None
    try:
        result = found.mapped(lambda x: compute(x, right or 0.0) if left is None else compute(left, x))
    except ZeroDivisionError:
        return None
    return result if node.target in _COMPARISONS else _held(result, node.meta["val"].dtype)


def _cast(found: Binary, dtype: torch.dtype) -> Binary | None:
    if dtype == torch.bool:
        return found.mapped(bool)
    return _held(found if dtype.is_floating_point else found.mapped(math.trunc), dtype)


def _held(found: Binary, dtype: torch.dtype) -> Binary | None:
    """The numbers as a dtype holds them: infinite beyond the largest float, and not understood beyond an integer."""
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if all(info.min <= x <= info.max for x in (found.yes, found.no)):
        return found
    if not dtype.is_floating_point:
        return None
    return found.mapped(lambda x: x if info.min <= x <= info.max else math.copysign(math.inf, x))


def _chosen(node: fx.Node, inner: Callable[[object], Binary | None]) -> Binary | None:
    """where(c, a, b), all of them of one condition or numbers."""
    condition, yes, no = node.args if node.target is aten.where.self else (node.args[1], node.args[2], node.args[0])
    chosen = inner(condition)
    if chosen is None and number(yes) is not None and number(no) is not None:
        return Binary(condition, float(number(yes) or 0.0), float(number(no) or 0.0))
    parts = [_constant(x, chosen) or inner(x) for x in (yes, no)]
    if chosen is None or any(x is None or _root(x) != _root(chosen) for x in parts):
        return None
    one, other = parts
    assert one is not None and other is not None
    return Binary(
        chosen.condition,
        one.yes if chosen.yes else other.yes,
        one.no if chosen.no else other.no,
        chosen.shaping,
    )


def _constant(x: object, like: Binary | None) -> Binary | None:
    value = number(x)
    return None if value is None or like is None else Binary(like.condition, value, value, like.shaping)


def _root(x: Binary | None) -> object:
    return None if x is None else (x.condition, x.shaping)
