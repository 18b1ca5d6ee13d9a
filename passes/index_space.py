"""Values of position tensors as expressions: what stands at index (b, h, i, j), in the indices and the sizes.

`IndexSpace.at(node, index)` walks from a node to its producers and rewrites the index on the way: a transpose permutes
it, a slice shifts it, an unsqueeze drops an entry, `arange` turns it into a number (the rules are in `index_rules.py`).
Comparisons and logic become sympy relations and connectives. Whatever is not understood becomes a leaf: an unknown
function of exactly the indices it is read at, so that nothing is ever claimed about it. Sizes are torch's own symbols;
`index_values.py` keeps numbers exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from sgl_npu.passes.index_values import (
    FLOATS,
    INTEGERS,
    Fit,
    Interval,
    Opaque,
    number,
)
from sgl_npu.runtime.sizes import Size, known

aten, prims = torch.ops.aten, torch.ops.prims
Index = tuple[sympy.Expr, ...]
Rule = Callable[["IndexSpace", fx.Node, Index], sympy.Basic]

_MOST_OPERATIONS = 400  # an expression larger than this is not worth proving anything about
_MOST_NESTED = 60  # nor is one through more producers than this
_LONGEST_IDENTITY = 6  # nodes are compared op by op through so many producers


class IndexSpace:
    """The expressions of one graph. `leaves` names the tensors that expressions could not look into, `nodes` has one
    of each name."""

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        self.rules = rules
        self.values = Fit()
        self.leaves: dict[Hashable, str] = {}
        self.nodes: dict[str, fx.Node] = {}
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
        dtype = dtype_of(node)
        rule = self.rules.get(node.target) if node.op == "call_function" else None
        if rule is not None and dtype in _UNDERSTOOD and self._nested <= _MOST_NESTED:
            try:
                value = self.fit(sympy.sympify(rule(self, node, index)), dtype, node, index)
                if value.count_ops() <= _MOST_OPERATIONS:
                    return value
            except Opaque:
                pass
        return self._leaf(node, dtype, index) if dtype is not None and dtype in (torch.bool, *INTEGERS) else None

    def _leaf(self, node: fx.Node, dtype: torch.dtype, index: Index) -> sympy.Basic:
        name = self.leaves.setdefault(_identity(node), f"leaf{len(self.leaves)}")
        self.nodes.setdefault(name, node)
        read_at = tuple(sympy.Integer(0) if known(n == 1) else x for n, x in zip(shape_of(node), index, strict=True))
        value = self.values.unknown(name, dtype, read_at)
        return sympy.Ne(value, 0) if dtype == torch.bool else value

    def operand(self, argument: Any, shape: Sequence[Size], index: Index) -> sympy.Basic:
        """An argument at an index of the shape it is broadcast to: dimensions of size 1 are read at 0."""
        if not _is_tensor(argument):
            return size_expression(argument)
        own = shape_of(argument)
        skipped = len(shape) - len(own)
        if skipped < 0:
            raise Opaque
        return self.at(argument, tuple(map(broadcast_position, own, shape[skipped:], index[skipped:])))

    def operands(
        self, node: fx.Node, arguments: Sequence[Any], dtype: torch.dtype | None, index: Index
    ) -> list[sympy.Basic]:
        """Arguments at an index of the node's shape, as numbers of a dtype (the one torch computes in if None)."""
        computed = _common_dtype(arguments) if dtype is None else dtype
        found = (self.operand(x, shape_of(node), index) for x in arguments)
        return [number(self.fit(x, computed, node, index)) for x in found]

    def fit(self, value: sympy.Basic, dtype: torch.dtype, node: fx.Node, index: Index) -> sympy.Basic:
        """A value that is wanted at an index of a node alone, as a tensor of this dtype holds it."""
        limits = index_limits(shape_of(node), index) if dtype in FLOATS else {}
        return self.values.fit(value, dtype, limits)


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


def dtype_of(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    return tuple(node.meta["val"].shape)


def index_limits(shape: Sequence[Size], index: Sequence[sympy.Expr]) -> dict[sympy.Symbol, Interval]:
    """Where the symbols of an index run, so that it stays inside of a shape: those in x, x + 1, 3 - x."""
    found: dict[sympy.Symbol, Interval] = {}
    for size, position in zip(shape, index, strict=True):
        if not isinstance(size, int) or len(position.free_symbols) != 1:
            continue
        (symbol,) = position.free_symbols
        before, after = symbol - position, symbol + position
        if before.is_Integer:
            found[symbol] = int(before), size - 1 + int(before)
        elif after.is_Integer:
            found[symbol] = int(after) - size + 1, int(after)
    return found


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def _identity(node: fx.Node, depth: int = _LONGEST_IDENTITY) -> Hashable:
    """Equal for nodes that compute the same from the same: a program may write its position ids down twice."""
    target = node.target
    if depth == 0 or not node.all_input_nodes or not isinstance(target, torch._ops.OpOverload):
        return node
    if target.namespace not in ("aten", "prims") or "empty" in target._opname:
        return node  # of a user's own op, and of memory that nobody has written, nothing is known
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return node

    def plain(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return _identity(value, depth - 1)
        if isinstance(value, (list, tuple)):
            return tuple(map(plain, value))
        return type(value), value

    named = ((name, plain(value)) for name, value in sorted(node.kwargs.items()))
    return target, plain(node.args), tuple(named)


def broadcast_position(own: Size, full: Size, position: sympy.Expr) -> sympy.Expr:
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


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dim_of(node: fx.Node, rank: int, position: int = 1) -> int:
    if rank == 0:
        raise Opaque
    return argument(node, position, "dim", 0) % rank
