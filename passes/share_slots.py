"""What every layer computes from the same slots of a cache is computed once.

before: scatter(k0, places(slots), …), scatter(k1, places(slots), …)    after: p = places(slots); scatter(k0, p, …), …

Only whole numbers and truth values that end in the update of a cache are shared: nobody sees two of them become one.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten, is_repeatable
from sgl_npu.passes.share_nodes import merge_equal, private_to
from sgl_npu.runtime.npu.scatter_nd_update import OP
from sgl_npu.runtime.npu.schemas import NAMESPACE

_ENDS = (aten.index_select.default, aten.where.self)


def share_slots(graph: fx.Graph) -> None:
    """Merge equal nodes of that kind, earlier ones taking the users of later ones."""
    updates = [node for node in graph.nodes if _is_update(node)]
    if len(updates) < 2:
        return
    starts = [x for node in updates for x in node.all_input_nodes]
    ends = {*updates, *(node for node in graph.nodes if node.target in _ENDS)}
    merge_equal(graph, private_to(starts, ends.__contains__, _is_shareable))


def _is_update(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == f"{NAMESPACE}::{OP}"


def _is_shareable(node: fx.Node) -> bool:
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else (values,)
    pure = node.target is operator.getitem or is_repeatable(node.target)
    return pure and all(isinstance(x, torch.Tensor) and not x.is_floating_point() for x in values)
