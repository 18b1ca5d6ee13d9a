"""What every layer computes from the same slots of a cache is computed once.

before: scatter(k0, places(slots), …), scatter(k1, places(slots), …)    after: p = places(slots); scatter(k0, p, …), …

Only whole numbers and truth values that end in the update of a cache are shared: nobody sees two of them become one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.inline import hashable
from sgl_npu.runtime.npu.scatter_nd_update import OP
from sgl_npu.runtime.npu.schemas import NAMESPACE

_ENDS = (aten.index_select.default, aten.where.self)


def share_slots(graph: fx.Graph) -> None:
    """Merge equal nodes of that kind, earlier ones taking the users of later ones."""
    updates = [node for node in graph.nodes if _is_update(node)]
    if len(updates) < 2:
        return
    seen: dict[Any, fx.Node] = {}
    for node in _private_to(updates):
        key = node.target, hashable(node.args), tuple(sorted((name, hashable(x)) for name, x in node.kwargs.items()))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_update(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == f"{NAMESPACE}::{OP}"


def _private_to(updates: list[fx.Node]) -> list[fx.Node]:
    """In graph order, the shareable nodes behind the updates that nothing but the updates is computed from."""
    ancestors, queue = set(), [x for node in updates for x in node.all_input_nodes]
    while queue:
        node = queue.pop()
        if node not in ancestors:
            ancestors.add(node)
            queue += node.all_input_nodes
    found: set[fx.Node] = set()
    for node in sorted(ancestors, reverse=True):
        ends = {user for user in node.users if user.target in _ENDS or user in updates}
        if _is_shareable(node) and set(node.users) <= found | ends:
            found.add(node)
    return sorted(found)


def _is_shareable(node: fx.Node) -> bool:
    pure = node.target is operator.getitem or (
        isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else (values,)
    return pure and all(isinstance(x, torch.Tensor) and not x.is_floating_point() for x in values)
