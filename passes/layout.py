"""Compute query, key and value in (B, S, N, D), the projections' own order, so that no transpose is left.

before: transpose(view(linear(x), (B, S, N, D))) → mul(cos), neg, cat, … → attention
after:  view(linear(x), (B, S, N, D)) → mul(cos), neg, cat, … → transpose → attention

The last transpose is cancelled by the kernel's own when it takes BSND. `swap(n)` below is n.transpose(1, 2): a node
moves if its swap can be computed from swaps of its inputs down to transposes that the model itself wrote. Other users
of a moved node get the transpose of its new form. Nothing moves unless all of query, key and value do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten, insert_op, swapped_source
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.sizes import known

_SWAP = {0: 0, 1: 2, 2: 1, 3: 3}
_LAST_DIM_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
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
            return Refusal(
                f"{name} comes through {_name(stuck)}, which does not commute with the transpose", stuck
            )
        moves[name] = node
    return Match(site, moves) if moves else Refusal("already in (B, S, N, D)", site.node)


def rewrite(match: Match) -> None:
    built: dict[fx.Node, fx.Node] = {}
    for name, node in match.moves.items():
        moved = _swap(node, built)
        match.site.set_argument(name, insert_op(match.site.node, aten.transpose.int, (moved, 1, 2)))
    recomputed = {node for node in built if _computes(node)}
    for old in recomputed:
        outside = [
            user for user in old.users if user not in recomputed and (user.users or user.op == "output")
        ]
        if outside:
            new = built[old]
            back = insert_op(old, aten.transpose.int, (new, 1, 2))
            old.replace_all_uses_with(back, delete_user_cb=lambda user, keep=outside: user in keep)


def _computes(node: fx.Node) -> bool:
    """The swap of the node repeats work, so that its other users must share it; views cost nothing."""
    return (
        swapped_source(node) is None and node.target is not aten.unsqueeze.default and _through(node) is None
    )


def _through(node: fx.Node) -> fx.Node | None:
    """What a node only passes on: a clone, or a concatenation with nothing (an empty KV cache)."""
    if node.target is aten.clone.default:
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.cat.default:
        parts = [x for x in node.args[0] if not known(x.meta["val"].numel() == 0)]  # type: ignore[union-attr]
        if len(parts) == 1 and parts[0].meta["val"].dtype == node.meta["val"].dtype:
            return parts[0]
    return None


def _operands(node: fx.Node) -> list[fx.Node]:
    """Inputs of rank 2 and more, which must be swapped; smaller ones broadcast along the last dimension alone."""
    return [
        x
        for x in node.all_input_nodes
        if isinstance(x.meta.get("val"), torch.Tensor) and x.meta["val"].dim() > 1
    ]


def _stuck(node: fx.Node, visited: set[fx.Node]) -> fx.Node | None:
    """The deepest node whose swap cannot be computed without a new transpose; None if the whole way is clear."""
    if node in visited:
        return None
    visited.add(node)
    through = _through(node)
    if through is not None:
        return _stuck(through, visited)
    if swapped_source(node) is not None:
        return None
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or node.op != "call_function":
        return node
    if node.target is aten.unsqueeze.default:
        return None if node.args[1] in (1, 2) else node
    if not (_is_pointwise(node) or _is_dimwise(node)):
        return node
    for operand in _operands(node):
        if operand.meta["val"].dim() != 4:
            return operand
        stuck = _stuck(operand, visited)
        if stuck is not None:
            return stuck
    return None


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target._opname in _POINTWISE
    )


def _is_dimwise(node: fx.Node) -> bool:
    """Ops with a dimension argument that the swap renumbers, or that work along the last dimension."""
    if node.target in _LAST_DIM_REDUCTIONS:
        return node.args[1] in ([-1], [3]) and node.args[2:3] == (True,)
    return node.target in (aten.cat.default, aten.slice.Tensor)


def _swap(node: fx.Node, built: dict[fx.Node, fx.Node]) -> fx.Node:
    if node not in built:
        built[node] = _build(node, built)
    return built[node]


def _build(node: fx.Node, built: dict[fx.Node, fx.Node]) -> fx.Node:
    through = _through(node)
    if through is not None:
        return _swap(through, built)
    source = swapped_source(node)
    if source is not None:
        return source
    if node.target is aten.unsqueeze.default:
        return insert_op(node, node.target, (node.args[0], _SWAP[node.args[1]]))  # type: ignore[index]
    swapped = {x: _swap(x, built) for x in _operands(node)}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: swapped.get(n, n))
    if node.target in (aten.cat.default, aten.slice.Tensor):
        dim = args[1] if len(args) > 1 else 0
        args = (args[0], _SWAP[dim % 4], *args[2:])
    return insert_op(node, node.target, tuple(args), dict(kwargs))


def _name(node: fx.Node) -> str:
    target = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) else f"the {node.op} {node.name!r}"
