"""Small facts about ATen nodes that several passes ask for, and one way to insert an op with its fake value."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sgl_npu.runtime.sizes import known, same_sizes

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
NEGATIONS = (aten.bitwise_not.default, aten.logical_not.default)
MULTIPLICATIONS = (aten.mul.Tensor, aten.mul.Scalar)
DIVISIONS = (aten.div.Tensor, aten.div.Scalar)


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


def move_users_after(node: fx.Node, anchor: fx.Node) -> None:
    """Put what depends on `node` and stands before it behind `anchor`, which comes later and depends on none of it."""
    early = {user for user in node.users if user < node}
    queue = list(early)
    while queue:
        new = {user for user in queue.pop().users if user < node} - early
        early |= new
        queue += new
    for user in sorted(early, reverse=True):
        anchor.append(user)


def swapped_source(node: fx.Node) -> fx.Node | None:
    """The x of a node that is x.transpose(1, 2), however it is spelled; None for anything else."""
    if node.target is aten.transpose.int and sorted(d % _rank(node) for d in node.args[1:3]) == [1, 2]:
        return _source(node)
    if node.target is aten.permute.default and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]:
        return _source(node)
    return None


def dimension_argument(node: fx.Node, position: int, of: fx.Node | None = None) -> int:
    """The dimension that is an argument of a node, as one of the node's own or of another's."""
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return dim % _rank(node if of is None else of)


def permuted_order(node: fx.Node) -> list[int]:
    """For every dimension of a permute, transpose or t the one of its source that it was."""
    rank = _rank(node)
    if node.target is aten.permute.default:
        return [dim % rank for dim in node.args[1]]
    order = list(range(rank))
    one, other = (dim % rank for dim in (node.args[1:3] if node.target is aten.transpose.int else (0, rank - 1)))
    order[one], order[other] = other, one
    return order


def skip_copies(node: fx.Node) -> fx.Node:
    """The node behind clones, which change strides and no value."""
    while node.target is aten.clone.default:
        node = _source(node)
    return node


# Whose ops say by a tag that they are random; a custom op of a user's need not.
_TAGGED = ("aten", "prims", "sgl_npu", "npu")


def is_repeatable(target: Any) -> bool:
    """Whether an op computes the same from the same arguments, and nothing else happens."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _TAGGED:
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def same_value(one: object, other: object, depth: int = 8) -> bool:
    """Whether two arguments are one node, or computed alike from the same nodes by ops that are not random."""
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or one is other:
        return type(one) is type(other) and one == other
    if one.op == other.op == "get_attr":
        return _same_literal(one, other)
    if depth == 0 or one.target is not other.target or not is_repeatable(one.target):
        return False
    pairs = [*zip(one.args, other.args, strict=False)]
    same_rest = len(one.args) == len(other.args) and one.kwargs == other.kwargs
    return same_rest and all(same_value(a, b, depth - 1) for a, b in pairs)


def _same_literal(one: fx.Node, other: fx.Node) -> bool:
    """Both are the same number, written as a tensor in the traced code."""
    module = one.graph.owning_module
    a, b = (getattr(module, str(node.target), None) for node in (one, other))
    if (
        not (type(a) is type(b) is torch.Tensor)
        or a.is_meta
        or (a.numel(), a.dtype, a.device) != (1, b.dtype, b.device)
    ):
        return False
    with unset_fake_temporarily():
        return torch.equal(a, b)


def value_numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """A number for every node; equal numbers for what is computed alike from the same inputs, by ops that are pure."""
    numbers: dict[fx.Node, int] = {}
    known_values: dict[Any, int] = {}
    for node in graph.nodes:
        key: Any = node
        target = node.target
        is_size = node.op == "call_function" and isinstance(node.meta.get("val"), (int, torch.SymInt, torch.SymFloat))
        if is_size or target is operator.getitem or is_repeatable(target):
            arguments = fx.map_arg((node.args, node.kwargs), lambda x: f"%{numbers[x]}")
            key = target, repr(arguments)
        numbers[node] = known_values.setdefault(key, len(known_values))
    return numbers


def is_float(argument: object) -> bool:
    """Whether an argument is a node that holds a tensor of a floating dtype."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def widens(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether a float dtype holds every value of another."""
    if before == after:
        return True
    is_plain = after.is_floating_point and min(before.itemsize, after.itemsize) > 1  # torch promotes no 8 bits
    return is_plain and torch.promote_types(before, after) == after


def is_one_per_row(value: torch.Tensor) -> bool:
    """Whether a tensor, broadcast to scores, is the same for every key."""
    return value.dim() == 0 or known(value.size(-1) == 1)


def adds_leading_ones(view: fx.Node) -> bool:
    """Whether a view only puts dimensions of size 1 in front, which broadcasting does anyway."""
    before, after = _source(view).meta["val"].shape, view.meta["val"].shape
    added = len(after) - len(before)
    padded = (1,) * added + tuple(before)
    return added >= 0 and all(known(a == b) for a, b in zip(padded, after, strict=True))


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Both are tensors of shapes known to be equal."""
    return same_sizes(one.meta["val"].shape, other.meta["val"].shape)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()
