"""Values of position tensors as expressions: what stands at index (b, h, i, j), in the indices and the sizes.

`IndexSpace.at(node, index)` walks from a node to its producers and rewrites the index on the way: a transpose permutes
it, a slice shifts it, an unsqueeze drops an entry, `arange` turns it into a number. Comparisons and logic become sympy
relations and connectives. Whatever is not understood becomes a leaf: an unknown function of exactly the indices it is
read at, so that nothing is ever claimed about it. Sizes are torch's own symbols; `index_values.py` keeps numbers exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx
from torch.utils._sympy.functions import FloorDiv, PythonMod

from sgl_npu.passes.index_values import (
    FLOATS,
    INTEGERS,
    Choice,
    Fit,
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
Index = tuple[sympy.Expr, ...]
Rule = Callable[["IndexSpace", fx.Node, Index], sympy.Basic]

_MOST_OPERATIONS = 400  # an expression larger than this is not worth proving anything about
_MOST_NESTED = 60  # nor is one through more producers than this


class IndexSpace:
    """The expressions of one graph. `leaves` names the tensors that expressions could not look into."""

    def __init__(self) -> None:
        self.values = Fit()
        self.leaves: dict[fx.Node, str] = {}
        self._known: dict[tuple[fx.Node, Index], sympy.Basic | None] = {}
        self._nested = 0

    def at(self, node: fx.Node, index: Index) -> sympy.Basic:
        """The value of `node` at `index` (one expression per dimension): a number or a condition."""
        key = (node, index)
        if key not in self._known:
            self._nested += 1
            try:
                self._known[key] = self._evaluate(node, index)
            finally:
                self._nested -= 1
        value = self._known[key]
        if value is None:
            raise Opaque
        return value

    def _evaluate(self, node: fx.Node, index: Index) -> sympy.Basic | None:
        dtype = _dtype(node)
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is not None and dtype in _UNDERSTOOD and self._nested <= _MOST_NESTED:
            try:
                value = self.values.fit(sympy.sympify(rule(self, node, index)), dtype)
                if value.count_ops() <= _MOST_OPERATIONS:
                    return value
            except Opaque:
                pass
        return self._leaf(node, dtype, index) if dtype is not None and dtype in (torch.bool, *INTEGERS) else None

    def _leaf(self, node: fx.Node, dtype: torch.dtype, index: Index) -> sympy.Basic:
        name = self.leaves.setdefault(node, f"leaf{len(self.leaves)}")
        read_at = tuple(sympy.Integer(0) if known(n == 1) else x for n, x in zip(_shape(node), index, strict=True))
        value = self.values.unknown(name, dtype, read_at)
        return sympy.Ne(value, 0) if dtype == torch.bool else value

    def operand(self, argument: Any, shape: Sequence[Size], index: Index) -> sympy.Basic:
        """An argument at an index of the shape it is broadcast to: dimensions of size 1 are read at 0."""
        if not _is_tensor(argument):
            return size_expression(argument)
        own = _shape(argument)
        skipped = len(shape) - len(own)
        if skipped < 0:
            raise Opaque
        return self.at(argument, tuple(map(_broadcast, own, shape[skipped:], index[skipped:])))

    def operands(
        self, node: fx.Node, arguments: Sequence[Any], dtype: torch.dtype | None, index: Index
    ) -> list[sympy.Basic]:
        """Arguments at an index of the node's shape, as numbers of a dtype (the one torch computes in if None)."""
        computed = _common_dtype(arguments) if dtype is None else dtype
        found = (self.operand(x, _shape(node), index) for x in arguments)
        return [number(self.values.fit(x, computed)) for x in found]


def size_expression(value: Any) -> sympy.Basic:
    """A number or a size of the graph as an expression."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float) and math.isinf(value):
        return sympy.oo if value > 0 else -sympy.oo
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return sympy.Integer(int(value))
    raise Opaque


_UNDERSTOOD = (torch.bool, *INTEGERS, *FLOATS)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _shape(node: fx.Node) -> tuple[Size, ...]:
    return tuple(node.meta["val"].shape)


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def _broadcast(own: Size, full: Size, position: sympy.Expr) -> sympy.Expr:
    if known(own == 1):
        return sympy.Integer(0)
    if known(own == full):
        return position
    raise Opaque


def _common_dtype(arguments: Sequence[Any]) -> torch.dtype:
    """The dtype in which torch computes an elementwise op."""
    values = [x.meta.get("val") if isinstance(x, fx.Node) else x for x in arguments]
    values = [0 if isinstance(x, torch.SymInt) else x for x in values]
    if not all(isinstance(x, (torch.Tensor, bool, int, float)) for x in values):
        raise Opaque
    return torch.result_type(values[0], values[-1])


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _dim(node: fx.Node, rank: int, position: int = 1) -> int:
    if rank == 0:
        raise Opaque
    return _argument(node, position, "dim", 0) % rank


# ---------------------------------------------------------------- where things come from


def _arange(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    first, step = (node.args[0] if len(node.args) > 1 else 0), _argument(node, 2, "step", 1)
    return size_expression(first) + size_expression(step) * index[0]


def _iota(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return size_expression(node.kwargs["start"]) + size_expression(node.kwargs["step"]) * index[0]


def _constant(position: int | None, value: int = 0) -> Rule:
    """A tensor filled with an argument, or with a number that the op's name says."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        return size_expression(value if position is None else _argument(node, position, "fill_value"))

    return rule


# ---------------------------------------------------------------- where things go: the index is rewritten


def _same(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Copies, conversions, broadcasts."""
    return space.operand(node.args[0], _shape(node), index)


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
    dim = _dim(node, len(index) + 1)
    position = _from_start(_argument(node, 2, "index"), _shape(source)[dim])
    return space.at(source, (*index[:dim], position, *index[dim:]))


def _slice(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return space.at(node.args[0], before_slice(node, index))


def before_slice(node: fx.Node, index: Index) -> Index:
    """The index of the source that a slice reads at its own index."""
    source: Any = node.args[0]
    dim, start = _dim(node, len(index)), _argument(node, 2, "start")
    first = sympy.Integer(0) if start is None else _from_start(start, _shape(source)[dim])
    step = size_expression(_argument(node, 4, "step", 1))
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
    kept = [(n, x) for n, x in zip(_shape(node), index, strict=True) if not known(n == 1)]
    moved: list[Any] = []
    for size in _shape(source):
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
    own = _shape(source)
    moved = []
    for size, full, x in zip(own, _shape(node)[len(index) - len(own) :], index[len(index) - len(own) :], strict=True):
        if known(size == 1) or known(size == full):
            moved.append(_broadcast(size, full, x))
        else:
            moved.append(PythonMod(x, positive_divisor(size_expression(size))))
    return space.at(source, tuple(moved))


def _flip(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    moved = list(index)
    for dim in node.args[1]:
        moved[dim] = size_expression(_shape(node)[dim]) - 1 - moved[dim]
    return space.at(node.args[0], tuple(moved))


def _pad(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Entries around a tensor, the last dimension's first; negative padding takes entries away."""
    source, padding = node.args[:2]
    moved, inside = list(index), []
    for place in range(0, len(padding), 2):
        dim = len(index) - 1 - place // 2
        moved[dim] = index[dim] - size_expression(padding[place])
        inside += [moved[dim] >= 0, moved[dim] < size_expression(_shape(source)[dim])]
    dtype = _dtype(node)
    filled = space.values.fit(size_expression(_argument(node, 2, "value", 0)), dtype)
    return pick(sympy.And(*inside), space.at(source, tuple(moved)), filled)


def _cat(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    dim, dtype = _dim(node, len(index)), _dtype(node)
    parts: list[Any] = [part for part in node.args[0] if len(_shape(part)) == len(index)]
    begin: sympy.Expr = sympy.Integer(0)
    pieces: list[tuple[sympy.Basic, sympy.Basic]] = []
    for part in parts:
        end = begin + size_expression(_shape(part)[dim])
        value = space.values.fit(space.at(part, (*index[:dim], index[dim] - begin, *index[dim + 1 :])), dtype)
        pieces.append((value, index[dim] < end))
        begin = end
    if len(parts) == 2 and known(_shape(parts[0])[dim] == 1) and _continues(space, parts, index, dim):
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
    chosen: list[Any] = [*node.args[1], *([None] * len(_shape(source)))][: len(_shape(source))]
    places = [dim for dim, x in enumerate(chosen) if x is not None]
    if not places or any(_dtype(chosen[dim]) not in (torch.int64, torch.int32) for dim in places):
        raise Opaque
    rank = max(len(_shape(chosen[dim])) for dim in places)
    begin = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    kept = iter(index[:begin] + index[begin + rank :])
    inner, shape = index[begin : begin + rank], _shape(node)[begin : begin + rank]
    moved = [next(kept) if x is None else _position(space, x, shape, inner) for x in chosen]
    return space.at(source, tuple(moved))


def _index_select(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, dim = node.args[0], _dim(node, len(index))
    chosen: Any = node.args[2]
    position = _position(space, chosen, _shape(node)[dim : dim + 1], index[dim : dim + 1])
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
        if _dtype(node) not in INTEGERS or mode not in ("floor", "trunc"):
            raise Opaque
        dividend, divisor = space.operands(node, node.args[:2], None, index)
        if not (negative and mode == "floor") and space.values.interval(dividend)[0] < 0:
            raise Opaque
        return lifted(lambda a, b: function(a, positive_divisor(b)), dividend, divisor)

    return rule


def _clamp(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    functions = {"min": sympy.Max, "max": sympy.Min}
    given = {name: _argument(node, place, name) for place, name in enumerate(functions, 1)}
    return _clamped(space, node, index, [(functions[name], x) for name, x in given.items() if x is not None])


def _clamp_by(function: Callable[..., sympy.Basic]) -> Rule:
    return lambda space, node, index: _clamped(space, node, index, [(function, node.args[1])])


def _clamped(space: IndexSpace, node: fx.Node, index: Index, limits: list[tuple[Callable, Any]]) -> sympy.Basic:
    value, *bounds = space.operands(node, [node.args[0], *(x for _, x in limits)], _dtype(node), index)
    for (function, _), bound in zip(limits, bounds, strict=True):
        value = lifted(function, value, bound)
    return value


def _logic(function: Callable[..., sympy.Basic], arity: int = 2) -> Rule:
    """A connective. Bitwise ops on integers are not understood."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        operands = node.args[:arity]
        if _dtype(node) != torch.bool:
            raise Opaque
        return function(*(truth(space.operand(x, _shape(node), index)) for x in operands))

    return rule


def _where(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    condition, yes, no = node.args
    return _chosen(space, node, index, condition, yes, no)


def _masked_fill(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, condition, filled = node.args
    return _chosen(space, node, index, condition, filled, source)


def _chosen(space: IndexSpace, node: fx.Node, index: Index, condition: Any, yes: Any, no: Any) -> sympy.Basic:
    values = [space.operand(x, _shape(node), index) for x in (yes, no)]
    fitted = [space.values.fit(x, _dtype(node)) for x in values]
    return pick(truth(space.operand(condition, _shape(node), index)), *fitted)


def _triangle(compare: Callable[..., sympy.Basic]) -> Rule:
    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        diagonal = size_expression(_argument(node, 1, "diagonal", 0))
        zero = sympy.false if _dtype(node) == torch.bool else sympy.Integer(0)
        return pick(compare(index[-1] - index[-2], diagonal), space.at(node.args[0], index), zero)

    return rule


def _cumsum(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """The sum of the entries 0 to n of something linear in the entry's position."""
    if _dtype(node) not in INTEGERS:
        raise Opaque
    dim, position = _dim(node, len(index)), sympy.Dummy("position", integer=True, nonnegative=True)
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
