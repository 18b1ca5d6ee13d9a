"""Symbolic sizes as nodes of a graph, computed from the sizes of its inputs and from nothing else.

A size read off the scores is a user of the scores: it would keep them alive, and it is no reason to leave them whole.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.utils._sympy.functions import (
    CeilToInt,
    FloorDiv,
    FloorToInt,
    IntTrueDiv,
    Mod,
    PowByNatural,
    PythonMod,
    ToFloat,
    TruncToInt,
)
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from sgl_npu.passes.fx_ops import aten

_ARITHMETIC = (sympy.Add, sympy.Mul, FloorDiv, Mod, PythonMod)


def symbol_nodes(graph: fx.Graph) -> dict[sympy.Symbol, fx.Node]:
    """A node at the start of the graph for every symbol in it: the input that carries it, or a dimension of one."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    found: dict[sympy.Symbol, fx.Node] = {}
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found.setdefault(value.node.expr, node)
    for node in placeholders:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape) if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.expr not in found:
                found[size.node.expr] = _size_at_start(node, dim, size, placeholders[-1])
    return found


def _size_at_start(source: fx.Node, dim: int, size: torch.SymInt, last: fx.Node) -> fx.Node:
    if last.next.target is aten.sym_size.int and last.next.args == (source, dim):
        return last.next
    with source.graph.inserting_after(last):
        node = source.graph.call_function(aten.sym_size.int, (source, dim))
    node.meta["val"] = size
    return node


@contextlib.contextmanager
def long_products() -> Iterator[None]:
    """Context in which make_fx can compute products, powers and rounded quotients of sizes from those of its inputs.

    torch 2.13 writes a product of three as operator.mul(a, b, c), which raises, and knows neither powers nor
    `math.ceil(height / 2)`; the table in which it looks ops up is private. `factors_of` says what the nodes are that
    come of products and powers.
    """
    handlers: dict[Any, Any] = getattr(proxy_tensor, "_sympy_handlers", dict)()
    old = {kind: handlers.get(kind) for kind in _LONG}
    handlers.update(_LONG)
    try:
        yield
    finally:
        for kind, handler in old.items():
            handlers.pop(kind) if handler is None else handlers.update({kind: handler})


def _product(*sizes: Any) -> Any:
    return functools.reduce(operator.mul, sizes)


def _power(size: Any, exponent: int) -> Any:
    return _product(*[size] * int(exponent))


_LONG: dict[Any, Any] = {
    sympy.Mul: _product, sympy.Pow: _power, PowByNatural: _power,
    IntTrueDiv: operator.truediv, ToFloat: torch.sym_float,
    CeilToInt: math.ceil, FloorToInt: math.floor, TruncToInt: math.trunc,
}  # fmt: skip


def factors_of(target: Any, args: Sequence[Any]) -> list[Any] | None:
    """What a node that was traced under `long_products` multiplies; None for any other node."""
    if target is _product:
        return list(args)
    return [args[0]] * int(args[1]) if target is _power else None


def share_sizes(graph: fx.Graph) -> None:
    """Compute every size that is read off a tensor in the graph from the sizes of the inputs."""
    reads = [node for node in graph.nodes if node.target is aten.sym_size.int and node.args[0].op != "placeholder"]
    if not reads:
        return
    symbols = symbol_nodes(graph)
    start = next(node for node in graph.nodes if node.op != "placeholder" and node not in symbols.values())
    env = _traced(graph, symbols)
    built: dict[sympy.Expr, fx.Node | int] = {}
    with graph.inserting_before(start):
        for node in reads:
            value = node.meta["val"]
            expression = value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(int(value))
            if not _is_arithmetic_of(env, expression):
                continue
            if expression not in built:
                result = sympy_interp(_Arithmetic, env, expression)
                built[expression] = _valued(result.node) if isinstance(result, fx.Proxy) else int(result)
            node.replace_all_uses_with(built[expression])
            graph.erase_node(node)


class SizeNodes:
    """Sizes as arguments of the ops of a graph: numbers, or nodes at its start that compute them from its inputs."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.built: dict[sympy.Expr, fx.Node | int] = {}

    def argument(self, size: int | torch.SymInt) -> fx.Node | int:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        if expression not in self.built:
            symbols = symbol_nodes(self.graph)
            made = {*symbols.values(), *(x for x in self.built.values() if isinstance(x, fx.Node))}
            start = next(node for node in self.graph.nodes if node.op != "placeholder" and node not in made)
            with self.graph.inserting_before(start):
                result = sympy_interp(_Arithmetic, _traced(self.graph, symbols), expression)
            self.built[expression] = _valued(result.node) if isinstance(result, fx.Proxy) else int(result)
        return self.built[expression]


def sizes_function(inputs: Sequence[fx.Node], expressions: Sequence[sympy.Expr]) -> Callable[..., Sequence[int]] | None:
    """The function from a graph's inputs to the values of expressions of their sizes; None where one is no such."""
    graph = fx.Graph()
    for node in inputs:
        graph.placeholder(node.name).meta.update(node.meta)
    env = _traced(graph, symbol_nodes(graph))
    if not all(_is_arithmetic_of(env, x) for x in expressions):
        return None
    results = [sympy_interp(_Arithmetic, env, x) for x in expressions]
    graph.output([x.node if isinstance(x, fx.Proxy) else int(x) for x in results])
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph)


class _Arithmetic(PythonReferenceAnalysis):
    """Powers as products: compilers know those of sizes."""

    pow = pow_by_natural = staticmethod(_power)


def _traced(graph: fx.Graph, symbols: dict[sympy.Symbol, fx.Node]) -> dict[sympy.Symbol, Any]:
    """The symbols as values whose arithmetic is appended to the graph."""
    tracer = fx.proxy.GraphAppendingTracer(graph)
    return {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}


def _is_arithmetic_of(env: dict[sympy.Symbol, Any], expression: sympy.Expr) -> bool:
    if not expression.free_symbols <= env.keys():
        return False
    return all(_is_arithmetic(x) for x in sympy.preorder_traversal(expression))


def _is_arithmetic(expression: sympy.Basic) -> bool:
    if isinstance(expression, (sympy.Pow, PowByNatural)):
        return isinstance(expression.args[1], sympy.Integer) and expression.args[1] > 0
    return isinstance(expression, (sympy.Symbol, sympy.Integer, *_ARITHMETIC))


def _valued(node: fx.Node) -> fx.Node:
    """A node of arithmetic on sizes, and what it is computed from, with their values filled in."""
    if "val" not in node.meta:
        for source in node.all_input_nodes:
            _valued(source)
        args = fx.map_arg(node.args, lambda x: x.meta["val"])
        node.meta["val"] = node.target(*args)
    return node
