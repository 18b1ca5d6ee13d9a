"""How each op rewrites the index at which its inputs are read, and what it computes from them: one row per op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx
from torch.utils._sympy.functions import FloorDiv, PythonMod

from sgl_npu.passes.index_space import (
    Index,
    IndexSpace,
    Rule,
    argument,
    broadcast_position,
    dim_of,
    dtype_of,
    shape_of,
    size_expression,
)
from sgl_npu.passes.index_values import (
    INTEGERS,
    Choice,
    Opaque,
    at_most,
    below,
    is_condition,
    lifted,
    number,
    pick,
    positive_divisor,
    truth,
)
from sgl_npu.runtime.sizes import Size, known

aten, prims = torch.ops.aten, torch.ops.prims


# ---------------------------------------------------------------- where things come from


def _arange(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    first, step = (node.args[0] if len(node.args) > 1 else 0), argument(node, 2, "step", 1)
    return size_expression(first) + size_expression(step) * index[0]


def _iota(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return size_expression(node.kwargs["start"]) + size_expression(node.kwargs["step"]) * index[0]


def _constant(position: int | None, value: int = 0) -> Rule:
    """A tensor filled with an argument, or with a number that the op's name says."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        return size_expression(value if position is None else argument(node, position, "fill_value"))

    return rule


# ---------------------------------------------------------------- where things go: the index is rewritten


def _same(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Copies, conversions, broadcasts."""
    return space.operand(node.args[0], shape_of(node), index)


def _permute(order: Callable[[fx.Node, int], list[int]]) -> Rule:
    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        moved: list[Any] = [None] * len(index)
        for new, old in enumerate(order(node, len(index))):
            moved[old] = index[new]
        return space.at(node.args[0], tuple(moved))

    return rule


def _transposed(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if rank:
        a, b = ((d % rank) for d in node.args[1:3]) if len(node.args) > 2 else (0, rank - 1)
        order[a], order[b] = order[b], order[a]
    return order


def _unsqueeze(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return space.at(node.args[0], before_unsqueeze(node, index))


def before_unsqueeze(node: fx.Node, index: Index) -> Index:
    dim = node.args[1] % len(index)
    return index[:dim] + index[dim + 1 :]


def _select(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source: Any = node.args[0]
    dim = dim_of(node, len(index) + 1)
    position = _from_start(argument(node, 2, "index"), shape_of(source)[dim])
    return space.at(source, (*index[:dim], position, *index[dim:]))


def _slice(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return space.at(node.args[0], before_slice(node, index))


def before_slice(node: fx.Node, index: Index) -> Index:
    """The index of the source that a slice reads at its own index."""
    source: Any = node.args[0]
    dim, start = dim_of(node, len(index)), argument(node, 2, "start")
    first = sympy.Integer(0) if start is None else _from_start(start, shape_of(source)[dim])
    step = size_expression(argument(node, 4, "step", 1))
    return (*index[:dim], first + step * index[dim], *index[dim + 1 :])


def _from_start(position: Any, size: Size) -> sympy.Basic:
    """A position that may count from the end."""
    value = position.meta["val"] if isinstance(position, fx.Node) else position
    if known(value >= 0):
        return size_expression(value)
    if known(value < 0) and known(value + size >= 0):
        return size_expression(value + size)
    raise Opaque


def _view(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Views that only add and remove dimensions of size 1."""
    source: Any = node.args[0]
    kept = [(n, x) for n, x in zip(shape_of(node), index, strict=True) if not known(n == 1)]
    moved: list[Any] = []
    for size in shape_of(source):
        if known(size == 1):
            moved.append(sympy.Integer(0))
        elif kept and known(kept[0][0] == size):
            moved.append(kept.pop(0)[1])
        else:
            raise Opaque
    if kept:
        raise Opaque
    return space.at(source, tuple(moved))


def _repeat(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source: Any = node.args[0]
    own = shape_of(source)
    moved = []
    for size, full, x in zip(own, shape_of(node)[len(index) - len(own) :], index[len(index) - len(own) :], strict=True):
        if known(size == 1) or known(size == full):
            moved.append(broadcast_position(size, full, x))
        else:
            moved.append(PythonMod(x, positive_divisor(size_expression(size))))
    return space.at(source, tuple(moved))


def _flip(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    moved = list(index)
    for dim in node.args[1]:
        moved[dim] = size_expression(shape_of(node)[dim]) - 1 - moved[dim]
    return space.at(node.args[0], tuple(moved))


def _pad(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Entries around a tensor, the last dimension's first; negative padding takes entries away."""
    source, padding = node.args[:2]
    moved, inside = list(index), []
    for place in range(0, len(padding), 2):
        dim = len(index) - 1 - place // 2
        moved[dim] = index[dim] - size_expression(padding[place])
        inside += [moved[dim] >= 0, moved[dim] < size_expression(shape_of(source)[dim])]
    dtype = node.meta["val"].dtype
    filled = space.values.fit(size_expression(argument(node, 2, "value", 0)), dtype)
    return pick(sympy.And(*inside), space.at(source, tuple(moved)), filled)


def _cat(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    dim, dtype = dim_of(node, len(index)), node.meta["val"].dtype
    parts: list[Any] = [part for part in node.args[0] if len(shape_of(part)) == len(index)]
    begin: sympy.Expr = sympy.Integer(0)
    pieces: list[tuple[sympy.Basic, sympy.Basic]] = []
    for part in parts:
        end = begin + size_expression(shape_of(part)[dim])
        value = space.values.fit(space.at(part, (*index[:dim], index[dim] - begin, *index[dim + 1 :])), dtype)
        pieces.append((value, index[dim] < end))
        begin = end
    if len(parts) == 2 and known(shape_of(parts[0])[dim] == 1) and _continues(space, parts, index, dim):
        return pieces[1][0]
    value = pieces[-1][0]
    for piece, inside in reversed(pieces[:-1]):
        value = pick(inside, piece, value)
    return value


def _continues(space: IndexSpace, parts: list[fx.Node], index: Index, dim: int) -> bool:
    """One entry in front, and the rest, a polynomial, has that very entry at -1: no case distinction is needed."""

    def entry(part: fx.Node, position: sympy.Expr) -> sympy.Basic:
        return space.at(part, (*index[:dim], position, *index[dim + 1 :]))

    first, rest = entry(parts[0], sympy.Integer(0)), entry(parts[1], index[dim] - 1)
    if is_condition(rest) or not rest.is_polynomial(*rest.free_symbols) or rest.has(AppliedUndef, Choice):
        return False
    return sympy.expand(entry(parts[1], sympy.Integer(-1)) - first) == 0


def _index(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
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


def _index_select(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, dim = node.args[0], dim_of(node, len(index))
    chosen: Any = node.args[2]
    position = _position(space, chosen, shape_of(node)[dim : dim + 1], index[dim : dim + 1])
    return space.at(source, (*index[:dim], position, *index[dim + 1 :]))


def _position(space: IndexSpace, chosen: fx.Node, shape: Sequence[Size], index: Index) -> sympy.Basic:
    position = space.operand(chosen, shape, index)
    if space.values.interval(position)[0] < 0:
        raise Opaque
    return position


# ---------------------------------------------------------------- arithmetic and logic


def _elementwise(function: Callable[..., sympy.Basic], arity: int = 2) -> Rule:
    """An op on numbers. Bool operands count as 0 and 1."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > arity:
            raise Opaque
        return lifted(function, *space.operands(node, node.args[:arity], None, index))

    return rule


def _division(function: Callable[..., sympy.Basic], negative: bool = True) -> Rule:
    """A quotient or a remainder; `negative` says whether the function is torch's for negative dividends too."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        mode = node.kwargs.get("rounding_mode", "floor")
        if dtype_of(node) not in INTEGERS or mode not in ("floor", "trunc"):
            raise Opaque
        dividend, divisor = space.operands(node, node.args[:2], None, index)
        if not (negative and mode == "floor") and space.values.interval(dividend)[0] < 0:
            raise Opaque
        return lifted(lambda a, b: function(a, positive_divisor(b)), dividend, divisor)

    return rule


def _clamp(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    functions = {"min": sympy.Max, "max": sympy.Min}
    given = {name: argument(node, place, name) for place, name in enumerate(functions, 1)}
    return _clamped(space, node, index, [(functions[name], x) for name, x in given.items() if x is not None])


def _clamp_by(function: Callable[..., sympy.Basic]) -> Rule:
    return lambda space, node, index: _clamped(space, node, index, [(function, node.args[1])])


def _clamped(space: IndexSpace, node: fx.Node, index: Index, limits: list[tuple[Callable, Any]]) -> sympy.Basic:
    value, *bounds = space.operands(node, [node.args[0], *(x for _, x in limits)], dtype_of(node), index)
    for (function, _), bound in zip(limits, bounds, strict=True):
        value = lifted(function, value, bound)
    return value


def _logic(function: Callable[..., sympy.Basic], arity: int = 2) -> Rule:
    """A connective. Bitwise ops on integers are not understood."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        operands = node.args[:arity]
        if dtype_of(node) != torch.bool:
            raise Opaque
        return function(*(truth(space.operand(x, shape_of(node), index)) for x in operands))

    return rule


def _where(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    condition, yes, no = node.args
    return _chosen(space, node, index, condition, yes, no)


def _masked_fill(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, condition, filled = node.args
    return _chosen(space, node, index, condition, filled, source)


def _chosen(space: IndexSpace, node: fx.Node, index: Index, condition: Any, yes: Any, no: Any) -> sympy.Basic:
    values = [space.operand(x, shape_of(node), index) for x in (yes, no)]
    dtype = node.meta["val"].dtype
    fitted = [space.values.fit(x, dtype) for x in values]
    return pick(truth(space.operand(condition, shape_of(node), index)), *fitted)


def _triangle(compare: Callable[..., sympy.Basic]) -> Rule:
    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        diagonal = size_expression(argument(node, 1, "diagonal", 0))
        zero = sympy.false if dtype_of(node) == torch.bool else sympy.Integer(0)
        return pick(compare(index[-1] - index[-2], diagonal), space.at(node.args[0], index), zero)

    return rule


def _cumsum(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
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


_subtract = _elementwise(lambda a, b: a - b)
_COMPARISONS: dict[str, Callable[..., sympy.Basic]] = {
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lt": below,
    "le": at_most,
    "gt": lambda a, b: below(b, a),
    "ge": lambda a, b: at_most(b, a),
}

RULES: dict[Any, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    prims.iota.default: _iota,
    aten.full.default: _constant(1),
    aten.full_like.default: _constant(1),
    aten.new_full.default: _constant(2),
    aten.scalar_tensor.default: _constant(0),
    aten.fill.Scalar: _constant(1),
    aten.zeros.default: _constant(None, 0),
    aten.zeros_like.default: _constant(None, 0),
    aten.new_zeros.default: _constant(None, 0),
    aten.ones.default: _constant(None, 1),
    aten.ones_like.default: _constant(None, 1),
    aten.new_ones.default: _constant(None, 1),
    aten._to_copy.default: _same,
    prims.convert_element_type.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.expand.default: _same,
    aten.permute.default: _permute(lambda node, rank: [d % rank for d in node.args[1]]),
    aten.transpose.int: _permute(_transposed),
    aten.t.default: _permute(_transposed),
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.squeeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.repeat.default: _repeat,
    aten.flip.default: _flip,
    prims.rev.default: _flip,
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.add.Tensor: _elementwise(lambda a, b: a + b),
    aten.add.Scalar: _elementwise(lambda a, b: a + b),
    aten.sub.Tensor: _subtract,
    aten.sub.Scalar: _subtract,
    aten.rsub.Scalar: _elementwise(lambda a, b: b - a),
    aten.mul.Tensor: _elementwise(lambda a, b: a * b),
    aten.mul.Scalar: _elementwise(lambda a, b: a * b),
    aten.neg.default: _elementwise(lambda a: -a, 1),
    aten.abs.default: _elementwise(lambda a: sympy.Max(a, -a), 1),
    aten.floor_divide.default: _division(FloorDiv),
    aten.div.Tensor_mode: _division(FloorDiv),
    aten.div.Scalar_mode: _division(FloorDiv),
    aten.remainder.Scalar: _division(PythonMod),
    aten.remainder.Tensor: _division(PythonMod),
    aten.fmod.Scalar: _division(PythonMod, negative=False),
    aten.fmod.Tensor: _division(PythonMod, negative=False),
    aten.minimum.default: _elementwise(sympy.Min),
    aten.maximum.default: _elementwise(sympy.Max),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp_by(sympy.Max),
    aten.clamp_max.default: _clamp_by(sympy.Min),
    aten.cumsum.default: _cumsum,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.tril.default: _triangle(at_most),
    aten.triu.default: _triangle(lambda distance, diagonal: at_most(diagonal, distance)),
    **{
        getattr(getattr(aten, name), overload): _elementwise(compare)
        for name, compare in _COMPARISONS.items()
        for overload in ("Tensor", "Scalar")
    },
    aten.bitwise_and.Tensor: _logic(sympy.And),
    aten.bitwise_or.Tensor: _logic(sympy.Or),
    aten.bitwise_xor.Tensor: _logic(sympy.Xor),
    aten.bitwise_not.default: _logic(sympy.Not, 1),
    aten.logical_and.default: _logic(sympy.And),
    aten.logical_or.default: _logic(sympy.Or),
    aten.logical_xor.default: _logic(sympy.Xor),
    aten.logical_not.default: _logic(sympy.Not, 1),
}
