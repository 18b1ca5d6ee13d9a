"""Masks and biases that layers make alike from the same tensors are made once, and so is what kernels want of them.

before: attention(…, mask=unsqueeze(padding, 1)), attention(…, mask=unsqueeze(padding, 1))    two masks
after:  m = unsqueeze(padding, 1); attention(…, mask=m), attention(…, mask=m)                 one
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from sgl_npu.passes.fx_ops import value_numbers
from sgl_npu.passes.site import AttentionSite


def share_masks(graph: fx.Graph, sites: Sequence[AttentionSite]) -> None:
    """Merge equal nodes that only masks and biases of sites are made of; earlier ones take the users of later ones.

    A tensor that anything else reads stays as it is: two that the caller gets must not become one.
    """
    masks = {x for site in sites for name in ("mask", "bias") if (x := site.argument(name)) is not None}
    if len(masks) < 2:
        return
    graph.eliminate_dead_code()  # what a proof has left unused reads masks too
    numbers = value_numbers(graph)
    seen: dict[int, fx.Node] = {}
    for node in _private_to(masks, {site.node for site in sites}):
        first = seen.setdefault(numbers[node], node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _private_to(masks: set[fx.Node], readers: set[fx.Node]) -> list[fx.Node]:
    """In graph order, masks and what they are computed from, where nothing but masks is computed from it."""
    ancestors: set[fx.Node] = set()
    queue = list(masks)
    while queue:
        node = queue.pop()
        if node not in ancestors:
            ancestors.add(node)
            queue += node.all_input_nodes
    found: set[fx.Node] = set()
    for node in sorted(ancestors, reverse=True):
        if node.op == "call_function" and node not in readers and set(node.users) <= found | readers:
            found.add(node)
    return sorted(found)
