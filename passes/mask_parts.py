"""A mask taken apart where it is a conjunction, and what each part says at (b, h, i, j).

A part is a bool tensor of the graph, or its negation, or a float tensor of 0 and of numbers that forbid, which is added
to the scores (`mask_additive.py`). The views that the whole mask went through go with each of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from sgl_npu.passes.band import coordinates
from sgl_npu.passes.constants import MASKED
from sgl_npu.passes.fx_ops import NEGATIONS, aten, insert_op
from sgl_npu.passes.index_space import Index, IndexSpace, broadcast_position
from sgl_npu.passes.index_values import Opaque, lifted
from sgl_npu.passes.index_views import added_dims, before_slice, without
from sgl_npu.runtime.sizes import Size, known

AND = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor)
_OR = (aten.bitwise_or.Tensor, aten.logical_or.default, aten.add.Tensor)
COPIES = (aten.expand.default, aten.alias.default, aten.clone.default, aten.detach.default, aten._to_copy.default)


@dataclass(frozen=True)
class Part:
    """A node of the graph, or its negation, behind views that the whole mask went through (outermost first)."""

    node: fx.Node
    negated: bool = False
    views: tuple[fx.Node, ...] = ()
    additive: bool = False


def conjunction(part: Part, space: IndexSpace) -> Iterator[Part]:
    """The parts whose conjunction a part is, each broadcastable to it; broadcasts and copies are looked through."""
    node, negated = part.node, part.negated
    arguments: Any = node.args
    if part.additive:
        yield part
    elif node.target in COPIES and are_bool(node, arguments[0]):
        yield from conjunction(replace(part, node=arguments[0]), space)
    elif node.target in NEGATIONS and are_bool(node, arguments[0]):
        yield from conjunction(replace(part, node=arguments[0], negated=not negated), space)
    elif node.target in (_OR if negated else AND) and are_bool(node, *arguments):
        for operand in arguments:
            yield from conjunction(replace(part, node=operand), space)
    elif is_part_view(node):
        yield from conjunction(replace(part, node=arguments[0], views=(*part.views, node)), space)
    elif (operands := _chosen(node, negated, space)) is not None:
        for operand, other in operands:
            yield from conjunction(replace(part, node=operand, negated=other), space)
    else:
        yield part


def is_part_view(node: fx.Node) -> bool:
    """Whether a mask that goes through the op can be taken apart, its parts going through the op one by one."""
    return node.target is aten.slice.Tensor or added_dims(node) is not None


def _chosen(node: fx.Node, negated: bool, space: IndexSpace) -> list[tuple[fx.Node, bool]] | None:
    """Two operands, negated or not, whose conjunction a where or masked_fill with a constant is."""
    if node.target is aten.where.self:
        condition, yes, no = node.args
    elif node.target is aten.masked_fill.Scalar:
        no, condition, yes = node.args
    else:
        return None
    tensors = [x for x in (condition, yes, no) if not isinstance(x, (bool, int))]
    if not are_bool(node, *tensors):
        return None
    refused = sympy.sympify(negated)  # the constant under which nothing of the part is kept
    if _constant(yes, space) == refused and no in tensors:
        return [(condition, True), (no, negated)]
    if _constant(no, space) == refused and yes in tensors:
        return [(condition, False), (yes, negated)]
    return None


def _constant(argument: Any, space: IndexSpace) -> sympy.Basic | None:
    if not isinstance(argument, fx.Node):
        return sympy.sympify(bool(argument))
    value = space.at(argument, coordinates(argument.meta["val"].dim()))
    return value if value in (sympy.true, sympy.false) else None


def are_bool(node: fx.Node, *arguments: Any) -> bool:
    """All are bool tensors on the device of the node."""
    values = [x.meta.get("val") if isinstance(x, fx.Node) else None for x in arguments]
    device = node.meta["val"].device
    return all(isinstance(x, torch.Tensor) and x.dtype == torch.bool and x.device == device for x in values)


def condition_of(part: Part, shape: tuple[Size, ...], space: IndexSpace) -> sympy.Basic:
    """Where the part lets a key be attended: a condition on the index of the shape the mask is broadcast to."""
    value = value_of(part, shape, space)
    if part.additive:
        return lifted(kept, value)
    return sympy.Not(value) if part.negated else value


def kept(number: sympy.Basic) -> sympy.Basic:
    """Whether a number, added to a score, leaves it as it is (0) or forbids it; any other number is neither."""
    if number == 0:
        return sympy.true
    if number == -sympy.oo or (number.is_Integer and number <= MASKED):
        return sympy.false
    raise Opaque


def value_of(part: Part, shape: tuple[Size, ...], space: IndexSpace) -> sympy.Basic:
    """What the node says, before negation."""
    index: Index = coordinates(len(shape))
    for view in part.views:
        outer = tuple(view.meta["val"].shape)
        index = _read_at(outer, shape, index)
        dims = added_dims(view)
        index = before_slice(view, index) if dims is None else without(index, dims)
        inner: Any = view.args[0]
        shape = tuple(inner.meta["val"].shape)
    return space.at(part.node, _read_at(tuple(part.node.meta["val"].shape), shape, index))


def _read_at(own: tuple[Size, ...], full: tuple[Size, ...], index: Index) -> Index:
    """The index of a tensor that is broadcast to the shape that `index` is for."""
    skipped = len(full) - len(own)
    if skipped < 0:
        raise Opaque
    return tuple(map(broadcast_position, own, full[skipped:], index[skipped:]))


def present(part: Part, rank: int = 4) -> tuple[bool, ...]:
    """Along which dimensions the part, behind its views, has more than one entry."""
    shape: tuple[Size, ...] = tuple((part.views[0] if part.views else part.node).meta["val"].shape)
    return (False,) * (rank - len(shape)) + tuple(not known(size == 1) for size in shape)


def rebuilt(part: Part, depends: tuple[bool, ...], anchor: fx.Node) -> fx.Node:
    """The part as a bool node, behind its views, cut to one entry along every dimension that it does not depend on."""
    node = behind_views(part, anchor)
    rank = node.meta["val"].dim()
    for dim, needed in enumerate(depends[len(depends) - rank :]):
        if not needed and not known(node.meta["val"].size(dim) == 1):
            node = insert_op(anchor, aten.slice.Tensor, (node, dim, 0, 1))
    if part.additive:
        return insert_op(anchor, aten.gt.Scalar, (node, MASKED))
    return insert_op(anchor, NEGATIONS[0], (node,)) if part.negated else node


def behind_views(part: Part, anchor: fx.Node) -> fx.Node:
    """The node of a part in the shape that its views give it."""
    node = part.node
    for view in reversed(part.views):
        node = _view_again(view, node, anchor)
    return node


def _view_again(view: fx.Node, node: fx.Node, anchor: fx.Node) -> fx.Node:
    """The view of a node that is broadcastable to what the view is of."""
    own = node.meta["val"].dim()
    inner: Any = view.args[0]
    if node is inner:
        return view
    rank = inner.meta["val"].dim()
    added = added_dims(view)
    if added is not None:
        for dim in reversed(added):  # from the end, where the node may have fewer dimensions than the whole mask
            dim -= view.meta["val"].dim()
            if -dim <= node.meta["val"].dim() + 1:
                node = insert_op(anchor, aten.unsqueeze.default, (node, dim))
        return node
    dim = (view.args[1] if len(view.args) > 1 else 0) % rank - rank
    if -dim > own or known(node.meta["val"].size(dim) == 1):
        return node
    return insert_op(anchor, aten.slice.Tensor, (node, dim + own, *view.args[2:]), dict(view.kwargs))
