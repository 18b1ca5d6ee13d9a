"""Remove what the rewrites left idle: transposes that undo each other, views that change no shape.

before: transpose(transpose(x, 1, 2), 1, 2) → f        after: x → f
"""

from __future__ import annotations

from torch import fx

from sgl_npu.passes.fx_ops import aten, same_shape, swapped_source


def cancel_idle_views(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        source = _replacement(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _replacement(node: fx.Node) -> fx.Node | None:
    if node.target is aten.view.default:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source if same_shape(node, source) else None
    inner = swapped_source(node) if node.op == "call_function" else None
    return None if inner is None else swapped_source(inner)
