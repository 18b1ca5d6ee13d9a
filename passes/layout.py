"""Compute query, key and value in (B, S, N, D), the projections' own order, so that no transpose is left.

before: transpose(view(linear(x), (B, S, N, D))) → mul(cos), neg, cat, … → attention
after:  view(linear(x), (B, S, N, D)) → mul(cos), neg, cat, … → transpose → attention

The last transpose is cancelled by the kernel's own when it takes BSND. `swap(n)` below is n.transpose(1, 2): a node
moves if its swap can be computed from swaps of its inputs, down to transposes that the model itself wrote and to
tensors with one head or one row, whose swap is a view. Other users of a moved node get the transpose of its new form,
in the strides they were traced with. Nothing moves unless all of query, key and value do.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten, insert_op, skip_copies, swapped_source
from sgl_npu.passes.inline import dimension_order, same_strides
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.sizes import known

_SWAP = {0: 0, 1: 2, 2: 1, 3: 3}
_LAST_DIM_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
_NORMS = (aten.native_layer_norm.default, aten._fused_rms_norm.default)  # over the dims of args[1], the last ones
_DIM_ARGUMENT = {
    aten.cat.default: 1,
    aten.slice.Tensor: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
}
_POINTWISE = ("_to_copy", "convert_element_type")  # pointwise in fact, not tagged so


@dataclass(frozen=True)
class Match:
    site: AttentionSite
    moves: dict[str, fx.Node]


def match(site: AttentionSite) -> Match | Refusal:
    moves = {}
    for name in ("query", "key", "value"):
        node = site.argument(name)
        assert node is not None
        if swapped_source(node) is not None:
            continue
        stuck = _stuck(node, set())
        if stuck is not None:
            return Refusal(f"{name} comes through {_name(stuck)}, which does not commute with the transpose", stuck)
        moves[name] = node
    return Match(site, moves) if moves else Refusal("already in (B, S, N, D)", site.node)


def rewrite(match: Match) -> None:
    built: dict[fx.Node, fx.Node] = {}
    for name, node in match.moves.items():
        moved = _swap(node, built)
        match.site.set_argument(name, insert_op(match.site.node, aten.transpose.int, (moved, 1, 2)))
    recomputed = {node for node in built if _through(node) is None and _free_source(node) is None}
    for old in recomputed:
        outside = [user for user in old.users if user not in recomputed and (user.users or user.is_impure())]
        if outside and isinstance(old.meta["val"], torch.Tensor):
            back = _in_strides_of(old, insert_op(old, aten.transpose.int, (built[old], 1, 2)))
            old.replace_all_uses_with(back, delete_user_cb=lambda user, keep=outside: user in keep)


def _through(node: fx.Node) -> fx.Node | None:
    """What a node only passes on: a clone, or a concatenation with nothing (an empty KV cache)."""
    if node.target is aten.clone.default:
        return skip_copies(node)
    if node.target is aten.cat.default:
        parts = [x for x in node.args[0] if not known(x.meta["val"].numel() == 0)]
        if len(parts) == 1 and parts[0].meta["val"].dtype == node.meta["val"].dtype:
            return parts[0]
    return None


def _free_source(node: fx.Node) -> tuple[fx.Node, int] | fx.Node | None:
    """Where a swap costs nothing: the source of a transpose, or (a node, the one of its dims -3 and -2 to move)."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return None
    source = swapped_source(node) if value.dim() == 4 else None
    if source is not None:
        return source
    if value.dim() == 2 or known(value.size(-3) == 1):
        return node, -3
    return (node, -2) if known(value.size(-2) == 1) else None


def _operands(node: fx.Node) -> list[fx.Node]:
    """Inputs that must be swapped; tensors of rank 0 and 1 broadcast along the last dimension alone."""
    values = ((x, x.meta["val"]) for x in node.all_input_nodes)
    return [
        x
        for x, value in values
        if isinstance(value, (tuple, list)) or (isinstance(value, torch.Tensor) and value.dim() > 1)
    ]


def _stuck(node: fx.Node, visited: set[fx.Node]) -> fx.Node | None:
    """The deepest node whose swap cannot be computed without a new transpose; None if the whole way is clear."""
    if node in visited:
        return None
    visited.add(node)
    through = _through(node)
    if through is not None:
        return _stuck(through, visited)
    if _free_source(node) is not None:
        return None
    if not _commutes(node):
        return node
    return next((stuck for x in _operands(node) if (stuck := _stuck(x, visited)) is not None), None)


def _commutes(node: fx.Node) -> bool:
    """swap(op(x)) = op(swap(x)), dimension arguments renumbered."""
    if node.target is operator.getitem:
        return isinstance(node.args[0].meta["val"], (tuple, list))
    value = node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in values):
        return False
    if node.target in _LAST_DIM_REDUCTIONS:
        return node.args[1] in ([-1], [3]) and node.args[2:3] == (True,)
    if node.target in _NORMS:
        return len(node.args[1]) == 1
    return node.target in _DIM_ARGUMENT or _is_pointwise(node)


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or target._opname in _POINTWISE


def _swap(node: fx.Node, built: dict[fx.Node, fx.Node]) -> fx.Node:
    if node not in built:
        built[node] = _build(node, built)
    return built[node]


def _build(node: fx.Node, built: dict[fx.Node, fx.Node]) -> fx.Node:
    through = _through(node)
    if through is not None:
        return _swap(through, built)
    source = _free_source(node)
    if isinstance(source, fx.Node):
        return source
    if source is not None:
        return _move_one(*source)
    swapped = {x: _swap(x, built) for x in _operands(node)}
    args, kwargs = fx.map_arg((list(node.args), node.kwargs), lambda n: swapped.get(n, n))
    args = list(args)
    index = _DIM_ARGUMENT.get(node.target)
    if index is not None:
        dim = args[index] if len(args) > index else 0
        args[index:] = [_SWAP[dim % 4], *args[index + 1 :]]
    return insert_op(node, node.target, tuple(args), dict(kwargs))


def _move_one(node: fx.Node, dim: int) -> fx.Node:
    """swap(node) where its size along `dim`, -3 (heads) or -2 (rows), is 1 or, along -3, missing."""
    anchor = node.next
    while anchor.op == "placeholder":
        anchor = anchor.next
    rank = node.meta["val"].dim()
    without = node
    if node.target is aten.unsqueeze.default and node.args[1] in (dim, dim + rank):
        without = node.args[0]
    elif rank >= -dim:
        without = insert_op(anchor, aten.squeeze.dim, (node, dim))
    return insert_op(anchor, aten.unsqueeze.default, (without, -5 - dim))


def _in_strides_of(old: fx.Node, new: fx.Node) -> fx.Node:
    """`new`, copied if what follows was traced on other strides."""
    value = old.meta["val"]
    if same_strides(new.meta["val"], value):
        return new
    order = dimension_order(value)
    new = insert_op(old, aten.permute.default, (new, order))
    new = insert_op(old, aten.clone.default, (new,), {"memory_format": torch.contiguous_format})
    return insert_op(old, aten.permute.default, (new, [order.index(dim) for dim in range(value.dim())]))


def _name(node: fx.Node) -> str:
    target = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) else f"the {node.op} {node.name!r}"
