"""Ops that put a tensor together from others, or choose its entries by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from sgl_npu.passes.index_space import (
    Index,
    IndexSpace,
    argument,
    dim_of,
    dtype_of,
    shape_of,
    size_expression,
)
from sgl_npu.passes.index_values import Choice, Opaque, is_condition, pick
from sgl_npu.passes.index_views import from_start
from sgl_npu.runtime.sizes import Size, known


def pad(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Entries around a tensor, the last dimension's first; negative padding takes entries away."""
    source, padding = node.args[:2]
    moved, inside = list(index), []
    for place in range(0, len(padding), 2):
        dim = len(index) - 1 - place // 2
        moved[dim] = index[dim] - size_expression(padding[place])
        inside += [moved[dim] >= 0, moved[dim] < size_expression(shape_of(source)[dim])]
    filled = space.values.fit(size_expression(argument(node, 2, "value", 0)), node.meta["val"].dtype)
    return pick(sympy.And(*inside), space.at(source, tuple(moved)), filled)


def cat(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    dim, dtype = dim_of(node, len(index)), node.meta["val"].dtype
    parts: list[Any] = [part for part in node.args[0] if len(shape_of(part)) == len(index)]
    begin: sympy.Expr = sympy.Integer(0)
    pieces: list[tuple[sympy.Basic, sympy.Basic]] = []
    for part in parts:
        end = begin + size_expression(shape_of(part)[dim])
        place = (*index[:dim], index[dim] - begin, *index[dim + 1 :])
        pieces.append((space.fit(space.at(part, place), dtype, part, place), index[dim] < end))
        begin = end
    if len(parts) == 2 and known(shape_of(parts[0])[dim] == 1) and _continues(space, parts, index, dim):
        return pieces[1][0]
    return _first_of(pieces)


def _first_of(pieces: list[tuple[sympy.Basic, sympy.Basic]]) -> sympy.Basic:
    """The value of the first piece whose condition holds; the last one's is not asked."""
    value = pieces[-1][0]
    for piece, inside in reversed(pieces[:-1]):
        value = pick(inside, piece, value)
    return value


def stack(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    dim, dtype = dim_of(node, len(index)), node.meta["val"].dtype
    rest = index[:dim] + index[dim + 1 :]
    parts: Any = node.args[0]
    values = [space.fit(space.at(part, rest), dtype, part, rest) for part in parts]
    return _first_of([(value, index[dim] <= place) for place, value in enumerate(values)])


def roll(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Entries moved along, those that fall off the end put at the start."""
    shifts, dims = node.args[1], argument(node, 2, "dims") or []
    if not dims and len(index) == 1:
        dims = [0]
    if len(shifts) != len(dims):
        raise Opaque
    value: list[tuple[sympy.Basic, Index]] = [(sympy.true, index)]
    for shift, dim in zip(shifts, dims, strict=True):
        size = shape_of(node)[dim]
        value = [
            (sympy.And(taken, here), (*place[:dim], moved, *place[dim:][1:]))
            for taken, place in value
            for here, moved in _rolled(place[dim], _from_end(shift, size), size)
        ]
    return _first_of([(space.at(node.args[0], place), taken) for taken, place in value])


def _rolled(
    position: sympy.Expr, shift: sympy.Expr, size: Size
) -> tuple[tuple[sympy.Basic, sympy.Expr], tuple[sympy.Basic, sympy.Expr]]:
    """Where an entry was before a shift of 0 to `size`: at the end, or `shift` before."""
    return (position < shift, position - shift + size_expression(size)), (position >= shift, position - shift)


def _from_end(shift: Any, size: Size) -> sympy.Expr:
    """A shift as one of 0 to `size`."""
    value = shift.meta["val"] if isinstance(shift, fx.Node) else shift
    if isinstance(value, int) and isinstance(size, int):
        return sympy.Integer(value % max(size, 1))
    if known(value >= 0) and known(value <= size):
        return size_expression(value)
    if known(value < 0) and known(-value <= size):
        return size_expression(value) + size_expression(size)
    raise Opaque


def select_scatter(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """A copy with one row, column, ... replaced."""
    dim = dim_of(node, len(index), 2)
    position = from_start(argument(node, 3, "index"), shape_of(node)[dim])
    return _replaced(space, node, index, sympy.Eq(index[dim], position), index[:dim] + index[dim + 1 :])


def slice_scatter(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """A copy with neighbouring rows, columns, ... replaced."""
    dim, start = dim_of(node, len(index), 2), argument(node, 3, "start")
    if argument(node, 5, "step", 1) != 1:
        raise Opaque
    begin = sympy.Integer(0) if start is None else from_start(start, shape_of(node)[dim])
    place = index[dim] - begin
    inside = sympy.And(place >= 0, place < size_expression(shape_of(node.args[1])[dim]))
    return _replaced(space, node, index, inside, (*index[:dim], place, *index[dim + 1 :]))


def _replaced(space: IndexSpace, node: fx.Node, index: Index, inside: sympy.Basic, place: Index) -> sympy.Basic:
    source, replaced = node.args[:2]
    new = space.operand(replaced, shape_of(replaced), place)
    return pick(inside, space.fit(new, node.meta["val"].dtype, replaced, place), space.at(source, index))


def _continues(space: IndexSpace, parts: list[fx.Node], index: Index, dim: int) -> bool:
    """One entry in front, and the rest, a polynomial, has that very entry at -1: no case distinction is needed."""

    def entry(part: fx.Node, position: sympy.Expr) -> sympy.Basic:
        return space.at(part, (*index[:dim], position, *index[dim + 1 :]))

    first, rest = entry(parts[0], sympy.Integer(0)), entry(parts[1], index[dim] - 1)
    if is_condition(rest) or not rest.is_polynomial(*rest.free_symbols) or rest.has(AppliedUndef, Choice):
        return False
    return sympy.expand(entry(parts[1], sympy.Integer(-1)) - first) == 0


def index_(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """x[..., i0, i1, ...] with integer tensors, none of them negative."""
    source: Any = node.args[0]
    chosen: list[Any] = [*node.args[1], *([None] * len(shape_of(source)))][: len(shape_of(source))]
    places = [dim for dim, x in enumerate(chosen) if x is not None]
    if not places or any(dtype_of(chosen[dim]) not in (torch.int64, torch.int32) for dim in places):
        raise Opaque
    rank = max(len(shape_of(chosen[dim])) for dim in places)
    begin = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    kept = iter(index[:begin] + index[begin + rank :])
    inner, shape = index[begin : begin + rank], shape_of(node)[begin : begin + rank]
    moved = [next(kept) if x is None else _position(space, x, shape, inner) for x in chosen]
    return space.at(source, tuple(moved))


def index_select(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, dim = node.args[0], dim_of(node, len(index))
    chosen: Any = node.args[2]
    position = _position(space, chosen, shape_of(node)[dim : dim + 1], index[dim : dim + 1])
    return space.at(source, (*index[:dim], position, *index[dim + 1 :]))


def gather(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, chosen = node.args[0], node.args[2]
    if not index or len(shape_of(source)) != len(index):
        raise Opaque
    dim = dim_of(node, len(index))
    position = _position(space, chosen, shape_of(node), index)
    return space.at(source, (*index[:dim], position, *index[dim + 1 :]))


def _position(space: IndexSpace, chosen: fx.Node, shape: Sequence[Size], index: Index) -> sympy.Basic:
    position = space.operand(chosen, shape, index)
    if space.values.interval(position)[0] < 0:
        raise Opaque
    return position
