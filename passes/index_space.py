"""Values of position tensors as expressions: what stands at index (b, h, i, j), in the indices and the sizes.

`IndexSpace.at(node, index)` walks from a node to its producers and rewrites the index on the way: a transpose permutes
it, a slice shifts it, an unsqueeze drops an entry, `arange` turns it into a number. Comparisons and logic become sympy
relations and connectives. Whatever is not understood becomes a leaf: an unknown function of exactly the indices it is
read at, so that nothing is ever claimed about it. Integers and bools only; sizes are torch's own symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, PythonMod

from sgl_npu.runtime.sizes import Size, known

aten = torch.ops.aten
Index = tuple[sympy.Expr, ...]
Rule = Callable[["IndexSpace", fx.Node, Index], sympy.Basic]

_MOST_OPERATIONS = 400  # an expression larger than this is not worth proving anything about


class Opaque(Exception):
    """This node's value at this index is not understood."""


class IndexSpace:
    """The expressions of one graph. `leaves` names the tensors that expressions could not look into."""

    def __init__(self) -> None:
        self.leaves: dict[fx.Node, str] = {}
        self._known: dict[tuple[fx.Node, Index], sympy.Basic] = {}

    def at(self, node: fx.Node, index: Index) -> sympy.Basic:
        """The value of `node` at `index` (one expression per dimension): an integer expression or a Boolean."""
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._evaluate(node, index)
        return self._known[key]

    def _evaluate(self, node: fx.Node, index: Index) -> sympy.Basic:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is not None and _dtype(node) in _EXACT:
            try:
                value = sympy.sympify(rule(self, node, index))
                if value.count_ops() <= _MOST_OPERATIONS:
                    return value
            except Opaque:
                pass
        return self._leaf(node, index)

    def _leaf(self, node: fx.Node, index: Index) -> sympy.Basic:
        name = self.leaves.setdefault(node, f"leaf{len(self.leaves)}")
        value = sympy.Function(name, integer=True)(*_collapsed(node, index))
        return sympy.Ne(value, 0) if _dtype(node) == torch.bool else value

    def operand(self, argument: Any, index: Index) -> sympy.Basic:
        """An argument of an elementwise op at the index of its result: broadcast dimensions are read at 0."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
            if _dtype(argument) not in _EXACT:
                raise Opaque
            rank = argument.meta["val"].dim()
            return self.at(argument, _collapsed(argument, index[len(index) - rank :]))
        return size_expression(argument)


def size_expression(value: Any) -> sympy.Basic:
    """A number or a size of the graph as an expression. Floats are not exact and not accepted."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    raise Opaque


# sympy calls a plain symbol Boolean too.
_CONDITION = (
    sympy.core.relational.Relational,
    sympy.logic.boolalg.BooleanFunction,
    sympy.logic.boolalg.BooleanAtom,
)
_EXACT = (torch.bool, torch.int64, torch.int32)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _shape(node: fx.Node) -> tuple[Size, ...]:
    return tuple(node.meta["val"].shape)


def _collapsed(node: fx.Node, index: Index) -> Index:
    return tuple(sympy.Integer(0) if known(n == 1) else x for n, x in zip(_shape(node), index, strict=True))


def _truth(value: sympy.Basic) -> sympy.Basic:
    """An integer as a condition."""
    return value if isinstance(value, _CONDITION) else sympy.Ne(value, 0)


def _number(value: sympy.Basic) -> sympy.Basic:
    """A condition as 0 or 1."""
    if not isinstance(value, _CONDITION):
        return value
    if value in (sympy.true, sympy.false):
        return sympy.Integer(int(bool(value)))
    return sympy.Piecewise((1, value), (0, True))


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _dim(node: fx.Node, source: fx.Node, position: int = 1, default: int = 0) -> int:
    return _argument(node, position, "dim", default) % len(_shape(source))


# ---------------------------------------------------------------- where things come from


def _arange(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    first = size_expression(node.args[0]) if len(node.args) > 1 else sympy.Integer(0)
    step = size_expression(node.args[2]) if len(node.args) > 2 else sympy.Integer(1)
    return first + step * index[0]


def _iota(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return size_expression(node.kwargs["start"]) + size_expression(node.kwargs["step"]) * index[0]


def _constant(position: int | None, value: int = 0) -> Rule:
    """A tensor filled with an argument, or with a number that the op's name says."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        filled = value if position is None else _argument(node, position, "fill_value")
        filled = size_expression(int(filled) if isinstance(filled, float) and filled.is_integer() else filled)
        return _truth(filled) if _dtype(node) == torch.bool else _number(filled)

    return rule


# ---------------------------------------------------------------- where things go: the index is rewritten


def _same(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """Copies and exact conversions."""
    value = space.operand(node.args[0], index)
    return _truth(value) if _dtype(node) == torch.bool else _number(value)


def _expand(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return space.operand(node.args[0], index)


def _permute(order: Callable[[fx.Node, int], list[int]]) -> Rule:
    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        source = node.args[0]
        moved: list[Any] = [None] * len(index)
        for new, old in enumerate(order(node, len(index))):
            moved[old] = index[new]
        return space.at(source, tuple(moved))

    return rule


def _transposed(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = ((d % rank) for d in node.args[1:3]) if len(node.args) > 2 else (0, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _unsqueeze(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    dim = node.args[1] % len(index)
    return space.at(node.args[0], index[:dim] + index[dim + 1 :])


def _select(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, dim = node.args[0], _dim(node, node.args[0])
    position = _from_start(node.args[2], _shape(source)[dim])
    return space.at(source, (*index[:dim], position, *index[dim:]))


def _slice(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, dim = node.args[0], _dim(node, node.args[0])
    start = _from_start(_argument(node, 2, "start") or 0, _shape(source)[dim])
    step = size_expression(_argument(node, 4, "step", 1))
    return space.at(source, (*index[:dim], start + step * index[dim], *index[dim + 1 :]))


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
    source = node.args[0]
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


def _cat(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    parts, dim = node.args[0], _dim(node, node.args[0][0])
    position, begin = index[dim], sympy.Integer(0)
    pieces: list[tuple[sympy.Basic, sympy.Basic]] = []
    for part in parts:
        end = begin + size_expression(_shape(part)[dim])
        pieces.append((space.at(part, (*index[:dim], position - begin, *index[dim + 1 :])), position < end))
        begin = end
    value = pieces[-1][0]
    for piece, inside in reversed(pieces[:-1]):
        value = _either(inside, piece, value)
    return _joined_first(space, parts, index, dim) if len(parts) == 2 and known(_shape(parts[0])[dim] == 1) else value


def _joined_first(space: IndexSpace, parts: list[fx.Node], index: Index, dim: int) -> sympy.Basic:
    """One entry in front: no case distinction where the rest, continued to the front, has that very entry there."""
    rest = space.at(parts[1], (*index[:dim], index[dim] - 1, *index[dim + 1 :]))
    first = space.at(parts[0], (*index[:dim], sympy.Integer(0), *index[dim + 1 :]))
    continued = space.at(parts[1], (*index[:dim], sympy.Integer(-1), *index[dim + 1 :]))
    leafless = not rest.has(sympy.core.function.AppliedUndef)
    return rest if leafless and sympy.simplify(continued - first) == 0 else _either(index[dim] < 1, first, rest)


def _index(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """x[i0, i1, ...] with integer tensors for the leading dimensions, none of them negative."""
    source, chosen = node.args
    if any(x is None or _dtype(x) == torch.bool for x in chosen):
        raise Opaque
    rest = len(_shape(source)) - len(chosen)
    outer = index[: len(index) - rest]
    positions = [space.operand(x, outer) for x in chosen]
    if not all(position.is_nonnegative for position in positions):
        raise Opaque
    return space.at(source, (*positions, *index[len(index) - rest :]))


# ---------------------------------------------------------------- arithmetic and logic


def _either(condition: sympy.Basic, yes: sympy.Basic, no: sympy.Basic) -> sympy.Basic:
    if isinstance(yes, _CONDITION) or isinstance(no, _CONDITION):
        yes, no = _truth(yes), _truth(no)
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return sympy.Piecewise((yes, condition), (no, True))


def _elementwise(function: Callable[..., Any], arity: int = 2) -> Rule:
    """An op on integers. Bool operands count as 0 and 1."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        if node.kwargs.get("alpha", 1) != 1:
            raise Opaque
        value = function(*(_number(space.operand(x, index)) for x in node.args[:arity]))
        return _truth(value) if _dtype(node) == torch.bool else value

    return rule


def _logic(function: Callable[..., Any], arity: int = 2) -> Rule:
    """A connective. Bitwise ops on integers are not understood."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        operands = node.args[:arity]
        if any(isinstance(x, fx.Node) and _dtype(x) != torch.bool for x in operands):
            raise Opaque
        return function(*(_truth(space.operand(x, index)) for x in operands))

    return rule


def _where(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    condition, yes, no = (space.operand(x, index) for x in node.args)
    return _either(_truth(condition), yes, no)


def _masked_fill(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    source, condition, filled = (space.operand(x, index) for x in node.args)
    return _either(_truth(condition), filled, source)


def _triangle(compare: Callable[..., Any]) -> Rule:
    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        diagonal = size_expression(_argument(node, 1, "diagonal", 0))
        zero = sympy.false if _dtype(node) == torch.bool else sympy.Integer(0)
        return _either(compare(index[-1] - index[-2], diagonal), space.at(node.args[0], index), zero)

    return rule


def _cumsum(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    """The sum of the entries 0 to n of something linear in the entry's position."""
    dim = _dim(node, node.args[0])
    position = sympy.Symbol("position", integer=True, nonnegative=True)
    term = sympy.expand(_number(space.at(node.args[0], (*index[:dim], position, *index[dim + 1 :]))))
    slope = sympy.diff(term, position) if term.is_polynomial(position) else None
    if slope is None or slope.has(position) or term.has(sympy.core.function.AppliedUndef, sympy.Piecewise):
        raise Opaque
    count = index[dim] + 1
    return slope * index[dim] * count / 2 + term.subs(position, 0) * count


RULES: dict[Any, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    torch.ops.prims.iota.default: _iota,
    aten.full.default: _constant(1),
    aten.full_like.default: _constant(1),
    aten.new_full.default: _constant(2),
    aten.scalar_tensor.default: _constant(0),
    aten.zeros.default: _constant(None, 0),
    aten.zeros_like.default: _constant(None, 0),
    aten.new_zeros.default: _constant(None, 0),
    aten.ones.default: _constant(None, 1),
    aten.ones_like.default: _constant(None, 1),
    aten.new_ones.default: _constant(None, 1),
    aten._to_copy.default: _same,
    torch.ops.prims.convert_element_type.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.expand.default: _expand,
    aten.permute.default: _permute(lambda node, rank: [d % rank for d in node.args[1]]),
    aten.transpose.int: _permute(_transposed),
    aten.t.default: _permute(_transposed),
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.cat.default: _cat,
    aten.index.Tensor: _index,
    aten.add.Tensor: _elementwise(lambda a, b: a + b),
    aten.sub.Tensor: _elementwise(lambda a, b: a - b),
    aten.rsub.Scalar: _elementwise(lambda a, b: b - a),
    aten.mul.Tensor: _elementwise(lambda a, b: a * b),
    aten.neg.default: _elementwise(lambda a: -a, 1),
    aten.floor_divide.default: _elementwise(FloorDiv),
    aten.remainder.Scalar: _elementwise(PythonMod),
    aten.minimum.default: _elementwise(sympy.Min),
    aten.maximum.default: _elementwise(sympy.Max),
    aten.cumsum.default: _cumsum,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.tril.default: _triangle(lambda distance, diagonal: distance <= diagonal),
    aten.triu.default: _triangle(lambda distance, diagonal: distance >= diagonal),
    **{
        getattr(getattr(aten, name), overload): _elementwise(compare)
        for name, compare in (
            ("eq", sympy.Eq),
            ("ne", sympy.Ne),
            ("lt", sympy.Lt),
            ("le", sympy.Le),
            ("gt", sympy.Gt),
            ("ge", sympy.Ge),
        )
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
