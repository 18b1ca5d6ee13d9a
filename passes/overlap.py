"""Operands that share memory are told apart before a compiler writes results over them.

before: x[1:] - x[:-1]        after: clone(x[1:]) - x[:-1]

npugraph_ex (torch_npu 2.13), like torch.fx.passes.reinplace whose rules it follows, turns an op into its in-place form
when nobody reads the first operand later. That another operand of the same op is a view of the same memory it does not
see: x[1:].sub_(x[:-1]) reads what it has just written. transformers' masks of packed sequences are written so. It also
drops copies that nothing seems to need, so this is done after that: `post_grad_custom_post_pass`. And it computes the
operands of a cat inside of the result.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from sgl_npu.passes.fx_ops import aten
from sgl_npu.runtime.sizes import known

# Written as a view and a copy_ into it.
_SCATTERS = (
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.diagonal_scatter.default,
    aten.as_strided_scatter.default,
)

# Their results are views, though their schemas do not say so.
_UNDECLARED_VIEWS = ("_unsafe_view", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes")


def separate_operands(graph: fx.Graph) -> None:
    """Copy the first operand of every op that may be written over it while it reads the same memory elsewhere."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not _has_in_place_form(node.target) or not node.args:
            continue
        first = node.args[0]
        if not isinstance(first, fx.Node) or not _fits(node, first) or not _is_writable(_memory(first)):
            continue
        if any(_reads_too(node, other, first) for other in tree_leaves((node.args[1:], node.kwargs))):
            node.update_arg(0, _copied(node, first))


def _reads_too(node: fx.Node, other: object, first: fx.Node) -> bool:
    """Whether another operand is in the memory of the first. An elementwise op may have one operand twice."""
    if not isinstance(other, fx.Node) or _places(other).isdisjoint(_places(first)):
        return False
    return other is not first or torch.Tag.pointwise not in node.target.tags


def _copied(node: fx.Node, first: fx.Node) -> fx.Node:
    with node.graph.inserting_before(node):
        copy = node.graph.call_function(aten.clone.default, (first,))
    copy.meta.update({name: x for name, x in node.meta.items() if name not in ("val", "tensor_meta")})
    value = first.meta.get("val")
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            copy.meta["val"] = value.clone()
    return copy


def _has_in_place_form(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if target in _SCATTERS:
        return True
    return hasattr(getattr(torch.ops, target.namespace), f"{target._opname}_") and not _returns_view(target)


def _fits(node: fx.Node, first: fx.Node) -> bool:
    """Whether the result may lie where the operand lies. An op that nothing is known of may."""
    result, operand = node.meta.get("val"), first.meta.get("val")
    if not isinstance(result, torch.Tensor) or not isinstance(operand, torch.Tensor):
        return True
    return result.dtype == operand.dtype and not known(result.numel() != operand.numel())


def _is_writable(memory: fx.Node) -> bool:
    """Results of the graph are; an input is where the graph changes it."""
    if memory.op == "call_function":
        return True
    return any(user.target is aten.copy_.default and user.args[0] is memory for user in memory.users)


def _memory(node: fx.Node) -> fx.Node:
    """The node whose result a chain of views looks into."""
    while True:
        source = node.args[0] if _is_view(node) else None
        if not isinstance(source, fx.Node):
            return node
        node = source


def _places(node: fx.Node) -> set[fx.Node]:
    """The nodes in whose results a node may lie: npugraph_ex has the operands of a cat written into its result."""
    memory = _memory(node)
    if memory.target is not aten.cat.default or (len(memory.args) > 1 and memory.args[1] != 0):
        return {memory}
    return {memory}.union(*(_places(part) for part in memory.args[0]))


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_view(source)
    return isinstance(node.target, torch._ops.OpOverload) and _returns_view(node.target)


def _returns_view(target: torch._ops.OpOverload) -> bool:
    if target._opname in _UNDECLARED_VIEWS:
        return True
    return any(result.alias_info is not None and not result.alias_info.is_write for result in target._schema.returns)
