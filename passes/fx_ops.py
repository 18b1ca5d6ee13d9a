"""Small facts about ATen nodes that several passes ask for, and one way to insert an op with its fake value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sgl_npu.runtime.sizes import known

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def insert_op(anchor: fx.Node, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A call of `target` before `anchor`, with the fake value of its result and the anchor's origin."""
    kwargs = kwargs or {}
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(target, args, kwargs)
    node.meta.update({name: value for name, value in anchor.meta.items() if name not in ("val", "tensor_meta")})
    values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = torch._guards.detect_fake_mode([value for value in torch.utils._pytree.tree_leaves(values)])
    assert mode is not None
    with mode, torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])
    return node


def swapped_source(node: fx.Node) -> fx.Node | None:
    """The x of a node that is x.transpose(1, 2), however it is spelled; None for anything else."""
    if node.target is aten.transpose.int and sorted(d % _rank(node) for d in node.args[1:3]) == [1, 2]:
        return _source(node)
    if node.target is aten.permute.default and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]:
        return _source(node)
    return None


def skip_copies(node: fx.Node) -> fx.Node:
    """The node behind clones, which change strides and no value."""
    while node.target is aten.clone.default:
        node = _source(node)
    return node


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Both are tensors of shapes known to be equal."""
    a, b = one.meta["val"].shape, other.meta["val"].shape
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b, strict=True))


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()
