"""Masks and biases that layers make alike from the same tensors are made once, and so is what kernels want of them.

before: attention(…, mask=unsqueeze(padding, 1)), attention(…, mask=unsqueeze(padding, 1))    two masks
after:  m = unsqueeze(padding, 1); attention(…, mask=m), attention(…, mask=m)                 one
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten, value_numbers
from sgl_npu.passes.site import AttentionSite, site_id


def share_masks(graph: fx.Graph, sites: Sequence[AttentionSite]) -> None:
    """Merge equal nodes behind the masks and biases of sites, earlier ones taking the users of later ones."""
    masks = {x for site in sites for name in ("mask", "bias") if (x := site.argument(name)) is not None}
    if len(masks) < 2:
        return
    numbers = value_numbers(graph)
    seen: dict[int, fx.Node] = {}
    for node in sorted(_ancestors(masks)):
        if node.op != "call_function" or site_id(node) is not None or _is_given_out(node):
            continue
        first = seen.setdefault(numbers[node], node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _ancestors(nodes: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


def _is_given_out(node: fx.Node) -> bool:
    """Whether the caller gets the tensor, or a view of it: two that he may write to must not become one."""
    return any(user.op == "output" or (_is_view(user) and _is_given_out(user)) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload) and node.target is not aten._unsafe_view.default:
        return any(result.alias_info is not None for result in node.target._schema.returns)
    return node.target in (operator.getitem, aten._unsafe_view.default)
