"""Whether the queries and keys of an attention are projections of the same tokens: equal lengths prove nothing."""

from __future__ import annotations

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten

# Products with weights, and the operand that is the activation.
_PROJECTIONS = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.linear.default: 0,
    aten.bmm.default: 0,
    aten.matmul.default: 0,
}
_LOOKED_THROUGH = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.expand.default,
)
_LIMIT = 400  # nodes between an attention and its projections: norms and rotary embeddings take some dozens


def is_self_attention(query: fx.Node, key: fx.Node) -> bool:
    """Both come from projections, and from those of the same activations, joined in the same order."""
    sources = _projected(query)
    return bool(sources) and sources == _projected(key)


def _projected(node: fx.Node) -> list[fx.Node]:
    """The activations whose projections a node is made of, in the order of its operands; none where it is too far."""
    found: dict[fx.Node, None] = {}
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        if node.target in _PROJECTIONS:
            found[_origin(node.args[_PROJECTIONS[node.target]])] = None
            continue
        inputs = [x for x in node.all_input_nodes if x not in seen and not isinstance(x.meta.get("val"), torch.SymInt)]
        seen.update(inputs)
        pending += reversed(inputs)
        if len(seen) > _LIMIT:
            return []
    return list(found)


def _origin(node: fx.Node) -> fx.Node:
    while node.target in _LOOKED_THROUGH:
        node = node.args[0]
    return node
