"""The graph around an attention as text, and what each layer of a graph writes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.graph_text import lines_of
from sgl_npu.compiler.trace import LayerCost
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.site import site_id, where
from sgl_npu.runtime.sizes import hint

_BACK, _AHEAD, _MOST = 44, 12, 56  # nodes before an attention, behind it, and in all
# Where the part of the graph that has to do with an attention ends: what projects its inputs and its output.
_ENDS = (
    aten.mm.default, aten.addmm.default, aten.linear.default, aten.embedding.default, aten.convolution.default,
)  # fmt: skip
_PRODUCTS = (aten.bmm.default, aten.baddbmm.default, aten.matmul.default)
_TRIANGLE = 2048  # rows and columns of the mask that Ascend's ops take for every length; no buffer of the model's
OUTSIDE = "outside of layers"


def around(anchors: Collection[fx.Node]) -> str:
    """The lines of the graph around an attention: from the projections to it, and what reads its result.

    Names are counted within the text, so layers that are alike have one text.
    """
    found = set(anchors)
    own = {None, *map(site_id, anchors)}  # of another attention nothing is shown, though they share a mask
    found |= _reached(anchors, found, lambda node: [x for x in node.all_input_nodes if site_id(x) in own], _BACK)
    found |= _reached(anchors, found, lambda node: [x for x in node.users if site_id(x) in own], _AHEAD)
    nodes = sorted(x for x in found if x.op != "output")[-_MOST:]
    return "\n".join(lines_of(nodes))


def _reached(starts: Iterable[fx.Node], known: set[fx.Node], near, most: int) -> set[fx.Node]:
    """Nodes that are reached breadth first, at most so many; projections and inputs are the last on a way."""
    queue, found = list(starts), set[fx.Node]()
    while queue and len(found) < most:
        node = queue.pop(0)
        if node.op != "call_function" or (node.target in _ENDS and node not in known):
            continue
        for x in near(node):
            if x not in found and x not in known and len(found) < most:
                found.add(x)
                queue.append(x)
    return found


def layer_costs(gm: GraphModule) -> dict[str, LayerCost]:
    """What the ops of each layer write, by the sizes at hand. A layer is a module's path up to its first number."""
    costs: dict[str, LayerCost] = {}
    for module in gm.modules():
        if isinstance(module, GraphModule):
            wide = set[fx.Node]()
            for node in module.graph.nodes:
                if node.op == "call_function":
                    if _has_columns(node, wide):
                        wide.add(node)
                    if isinstance(node.target, torch._ops.OpOverload):
                        _count(node, node in wide, costs)
    return costs


def _count(node: fx.Node, wide: bool, costs: dict[str, LayerCost]) -> None:
    tensors = list(_results(node))
    if not tensors or _is_view(node):
        return
    cost = costs.setdefault(_layer(where(node)[0]), LayerCost())
    cost.ops += 1
    for x in tensors:
        size = tensor_bytes(x)
        cost.bytes += size
        if x.dim() > 1 and not wide and not is_triangle(x):
            sizes = at_hand(x.size(-2)), at_hand(x.size(-1))
            count, total = cost.squares.get(sizes, (0, 0))
            cost.squares[sizes] = count + 1, total + size


def _has_columns(node: fx.Node, wide: set[fx.Node]) -> bool:
    """Whether the last dimension of a node is that of a projection's columns, and not of keys.

    It is behind what keeps it: pointwise ops, views, concatenations, ops with several results.
    """
    if node.target in _ENDS:
        return True
    if node.target in _PRODUCTS:
        return False
    sources = [x for x in node.all_input_nodes if x in wide]
    own = node.meta.get("val")
    if not isinstance(own, torch.Tensor):
        return bool(sources)
    if node.target is aten.cat.default:
        return len(sources) == len(node.all_input_nodes)
    return own.dim() > 0 and any(_same_columns(x.meta["val"], own) for x in sources)


def _same_columns(source: Any, own: torch.Tensor) -> bool:
    return not isinstance(source, torch.Tensor) or at_hand(source.size(-1)) == at_hand(own.size(-1))


def _results(node: fx.Node) -> Iterator[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return (x for x in leaves if isinstance(x, torch.Tensor) and x.layout is torch.strided)


def _is_view(node: fx.Node) -> bool:
    aliases = any(result.alias_info is not None for result in node.target._schema.returns)
    return aliases or node.target is aten._unsafe_view.default


def is_triangle(x: torch.Tensor) -> bool:
    """Whether it is the mask that Ascend's ops take for every length."""
    return x.dtype is torch.bool and x.dim() == 2 and all(at_hand(size) == _TRIANGLE for size in x.shape)


def tensor_bytes(x: torch.Tensor) -> int:
    return math.prod(at_hand(size) for size in x.shape) * x.element_size()


def is_at_hand(size: Any) -> bool:
    """Whether a size has a value in the call at hand; others are known when it runs."""
    return hint(size) is not None


def at_hand(size: Any) -> int:
    """A size in the call at hand; 1 where it has no value."""
    return hint(size) if is_at_hand(size) else 1


def _layer(path: str) -> str:
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return found[0] if found else OUTSIDE
