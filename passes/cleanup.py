"""Remove what the rewrites left idle: transposes that undo each other, copies to and fro, views that change no shape.

before: transpose(transpose(x, 1, 2), 1, 2) → f        after: x → f
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten, same_shape, swapped_source
from sgl_npu.passes.inline import same_strides


def cancel_idle_views(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        source = _replacement(node) if node.op == "call_function" else None
        if source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _replacement(node: fx.Node) -> fx.Node | None:
    if node.target in (aten.view.default, aten.alias.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source if same_shape(node, source) else None
    if node.target is aten.clone.default:
        return _copied_back(node)
    inner = swapped_source(node)
    return None if inner is None else swapped_source(inner)


def _copied_back(clone: fx.Node) -> fx.Node | None:
    """The x of clone(transpose(clone(transpose(x)))), where the last copy lies in memory as x does.

    Every step has one user and x is memory of its own, so that nobody sees two tensors become one.
    """
    node, swaps = clone, 0
    while True:
        swapped = swapped_source(node)
        source = node.args[0] if swapped is None and node.target is aten.clone.default else swapped
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            return None
        node, swaps = source, swaps + (swapped is not None)
        if swaps and swaps % 2 == 0 and _is_fresh(node):
            return node if same_strides(node.meta["val"], clone.meta["val"]) else None


def _is_fresh(node: fx.Node) -> bool:
    """The op that makes the tensor allocates it."""
    maker = node.args[0] if node.target is operator.getitem else node
    target = maker.target if isinstance(maker, fx.Node) else None
    return isinstance(target, torch._ops.OpOverload) and not any(result.alias_info for result in target._schema.returns)
