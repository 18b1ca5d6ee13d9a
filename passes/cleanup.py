"""Remove what the rewrites left idle: transposes that undo each other or move nothing, copies to and fro, same views.

before: transpose(transpose(x, 1, 2), 1, 2) → f        after: x → f
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten, insert_op, same_shape, swapped_source
from sgl_npu.passes.inline import same_strides
from sgl_npu.runtime.sizes import known


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
    source = swapped_source(node)
    if source is None:
        return None
    return swapped_source(source) or _view_of_single_row(node, source)


def _view_of_single_row(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """A transpose with a dimension of size 1 moves nothing: a view, which costs no kernel. At decode all of them do."""
    shape = node.meta["val"].shape
    unknown = [dim for dim, size in enumerate(shape) if not isinstance(size, int)]
    if len(unknown) > 1 or not (known(shape[1] == 1) or known(shape[2] == 1)):
        return None
    if not source.meta["val"].is_contiguous():
        return None
    return insert_op(node, aten.view.default, (source, [-1 if dim in unknown else n for dim, n in enumerate(shape)]))


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
