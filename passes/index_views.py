"""Ops that show the entries of one tensor in another place: the index at which it is read is rewritten."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import sympy
from torch import fx
from torch.utils._sympy.functions import PythonMod

from sgl_npu.passes.fx_ops import VIEWS
from sgl_npu.passes.index_space import (
    Index,
    IndexSpace,
    Rule,
    argument,
    aten,
    broadcast_position,
    dim_of,
    index_limits,
    shape_of,
    size_expression,
)
from sgl_npu.passes.index_values import Opaque, positive_divisor
from sgl_npu.runtime.sizes import Size, known


def same(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Copies, conversions, broadcasts."""
    return space.operand(node.args[0], shape_of(node), index)


def permute(order: Callable[[fx.Node, int], list[int]]) -> Rule:
    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        moved: list[Any] = [None] * len(index)
        for new, old in enumerate(order(node, len(index))):
            moved[old] = index[new]
        return space.at(node.args[0], tuple(moved))

    return rule


def transposed(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if rank:
        a, b = ((d % rank) for d in node.args[1:3]) if len(node.args) > 2 else (0, rank - 1)
        order[a], order[b] = order[b], order[a]
    return order


def unsqueeze(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    dims = added_dims(node)
    assert dims is not None
    return space.at(node.args[0], without(index, dims))


def added_dims(node: fx.Node) -> tuple[int, ...] | None:
    """The dimensions of one entry that an unsqueeze adds, or a view that does nothing else; None for other ops."""
    if node.target is aten.unsqueeze.default:
        return (node.args[1] % len(shape_of(node)),)
    if node.target not in VIEWS:
        return None
    left, added = list(shape_of(node.args[0])), []
    for dim, size in enumerate(shape_of(node)):
        if left and known(left[0] == size):
            left.pop(0)
        elif known(size == 1):
            added.append(dim)
        else:
            return None
    return tuple(added) if added and not left else None


def without(index: Index, dims: tuple[int, ...]) -> Index:
    return tuple(x for dim, x in enumerate(index) if dim not in dims)


def select(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source: Any = node.args[0]
    dim = dim_of(node, len(index) + 1)
    position = from_start(argument(node, 2, "index"), shape_of(source)[dim])
    return space.at(source, (*index[:dim], position, *index[dim:]))


def slice_(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return space.at(node.args[0], before_slice(node, index))


def before_slice(node: fx.Node, index: Index) -> Index:
    """The index of the source that a slice reads at its own index."""
    source: Any = node.args[0]
    dim, start = dim_of(node, len(index)), argument(node, 2, "start")
    first = sympy.Integer(0) if start is None else from_start(start, shape_of(source)[dim])
    step = size_expression(argument(node, 4, "step", 1))
    return (*index[:dim], first + step * index[dim], *index[dim + 1 :])


def from_start(position: Any, size: Size) -> sympy.Basic:
    """A position that may count from the end."""
    value = position.meta["val"] if isinstance(position, fx.Node) else position
    if known(value >= 0):
        return size_expression(value)
    if known(value < 0) and known(value + size >= 0):
        return size_expression(value + size)
    raise Opaque


def view(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Dimensions added, removed, merged and split; of those that merge or split, all but the first are numbers."""
    outer = [(n, x) for n, x in zip(shape_of(node), index, strict=True) if not known(n == 1)]
    inner = [(dim, n) for dim, n in enumerate(shape_of(node.args[0])) if not known(n == 1)]
    moved: list[Any] = [sympy.Integer(0)] * len(shape_of(node.args[0]))
    while outer or inner:
        group = _same_elements([n for n, _ in outer], [n for _, n in inner])
        if group is None:
            raise Opaque
        after, before = group
        positions = _regrouped(space, outer[-after:], [n for _, n in inner[-before:]])
        for (dim, _), position in zip(inner[-before:], positions, strict=True):
            moved[dim] = position
        outer, inner = outer[:-after], inner[:-before]
    return space.at(node.args[0], tuple(moved))


def _same_elements(outer: list[Size], inner: list[Size]) -> tuple[int, int] | None:
    """The smallest numbers of last dimensions, at least one on each side, that have as many elements on both sides."""
    counts = itertools.product(range(1, len(outer) + 1), range(1, len(inner) + 1))
    for after, before in sorted(counts, key=sum):
        if known(math.prod(outer[-after:]) == math.prod(inner[-before:])):
            return after, before
    return None


def _regrouped(space: IndexSpace, outer: list[tuple[Size, Any]], inner: list[Size]) -> list[sympy.Basic]:
    """Positions along the inner dimensions, from those along the outer ones that hold the same elements."""
    if len(outer) == len(inner) == 1:
        return [outer[0][1]]
    if not all(isinstance(n, int) for n in (*(n for n, _ in outer[1:]), *inner[1:])):
        raise Opaque
    place: sympy.Basic = sympy.Integer(0)
    for size, position in outer:
        place = place * size_expression(size) + position
    within = space.values.within(index_limits([n for n, _ in outer], [x for _, x in outer]))
    positions: list[sympy.Basic] = []
    for size in reversed(inner[1:]):
        place, position = within.divided(place, positive_divisor(size_expression(size)))
        positions.insert(0, position)
    return [place, *positions]


def repeat(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source: Any = node.args[0]
    own = shape_of(source)
    moved = []
    for size, full, x in zip(own, shape_of(node)[len(index) - len(own) :], index[len(index) - len(own) :], strict=True):
        if known(size == 1) or known(size == full):
            moved.append(broadcast_position(size, full, x))
        else:
            moved.append(PythonMod(x, positive_divisor(size_expression(size))))
    return space.at(source, tuple(moved))


def flip(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    moved = list(index)
    for dim in node.args[1]:
        moved[dim] = size_expression(shape_of(node)[dim]) - 1 - moved[dim]
    return space.at(node.args[0], tuple(moved))


def split_part(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """One result of a split or an unbind."""
    splitter, number = node.args
    target, source = splitter.target, splitter.args[0]
    if target not in (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default):
        raise Opaque
    dim = dim_of(splitter, len(shape_of(source)), 1 if target is aten.unbind.int else 2)
    if target is aten.unbind.int:
        return space.at(source, (*index[:dim], sympy.Integer(number), *index[dim:]))
    if target is aten.split.Tensor:
        begin = number * size_expression(splitter.args[1])
    else:
        begin = sum((size_expression(size) for size in splitter.args[1][:number]), sympy.Integer(0))
    return space.at(source, (*index[:dim], begin + index[dim], *index[dim + 1 :]))
