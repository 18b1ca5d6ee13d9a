"""The ops through which channels can be followed back, each with its rule; `Channels` asks them in turn.

A rule gets the labels of a result, and says what its channels are in terms of those of its arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from sgl_npu.passes.axes import Atom, regrouped
from sgl_npu.passes.channels import (
    CHANNEL,
    HEAD,
    ROW,
    SAMPLE,
    Factors,
    Heads,
    Label,
    Labels,
    Stuck,
    Values,
    columns_of,
    joined,
    negated,
    nothing,
)
from sgl_npu.passes.fx_ops import DIVISIONS, MULTIPLICATIONS, VIEWS, aten, value_numbers
from sgl_npu.passes.rms_norm import rms_norm
from sgl_npu.passes.token_rows import PRODUCTS
from sgl_npu.runtime.sizes import known

Result = Values | Stuck | None  # None: nothing is known of the op, or not of this use of it


def labels_of(node: fx.Node, labels: Sequence[Label]) -> Labels:
    """Labels for the dimensions of a tensor, none where the size is 1; they are aligned at the last dimension."""
    shape = shape_of(node)
    own = [*[None] * (len(shape) - len(labels)), *labels][-len(shape) :] if shape else []
    return tuple(None if known(size == 1) else label for size, label in zip(shape, own, strict=True))


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape, a complex number being two channels more."""
    value = node.meta["val"]
    return (*value.shape, 2) if value.is_complex() else tuple(value.shape)


class Channels:
    """The channels of the tensors of one graph, each computed once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.factors = Factors()
        self._numbers: dict[fx.Node, int] = value_numbers(graph)
        self._seen: dict[tuple[fx.Node, Labels], Values | Stuck] = {}

    def of(self, node: fx.Node, labels: Sequence[Label]) -> Values | Stuck:
        labels = labels_of(node, labels)
        key = node, labels
        if key not in self._seen:
            self._seen[key] = self._computed(node, labels)
        return self._seen[key]

    def _computed(self, node: fx.Node, labels: Labels) -> Values | Stuck:
        if not all(isinstance(x, int) for x in _kept(shape_of(node), labels)):
            return Stuck("the number of channels is no constant")
        rule = _RULES.get(node.target)
        found = rule(self, node, labels) if rule is not None else self._pointwise(node, labels)
        return self._opaque(node, labels) if found is None else found

    def _opaque(self, node: fx.Node, labels: Labels) -> Values | Stuck:
        """A tensor of which nothing is known: heads to start from, or a table."""
        arrays = _kept(shape_of(node), labels)
        if HEAD not in labels:
            return self.factors.table((self._numbers.get(node, node), labels), arrays)
        count = shape_of(node)[labels.index(HEAD)]
        if labels[-1] != CHANNEL or labels.count(CHANNEL) != 1 or ROW not in labels or not isinstance(count, int):
            return Stuck(f"{_name(node)} is no step of a rotary embedding")
        size = arrays[-1]
        return columns_of(Heads(node, count, size, labels=labels), np.arange(size, dtype=np.int64).reshape(arrays))

    def _pointwise(self, node: fx.Node, labels: Labels) -> Result:
        """An op on tables alone, element by element."""
        target = node.target
        if HEAD in labels or not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
            return None
        if torch.Tag.nondeterministic_seeded in target.tags or node.meta["val"].is_complex():
            return None
        tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
        if not tensors or any(x.meta["val"].is_complex() for x in tensors):
            return None
        tables = [self.of(x, labels) for x in tensors]
        if not all(isinstance(x, Values) and x.heads is None for x in tables):
            return None
        order = {x: i for i, x in enumerate(tensors)}
        key = (target, str(fx.map_arg((node.args, node.kwargs), lambda x: f"%{order.get(x, x)}")))
        return self.factors.pointwise(key, [self._ranked(x, node) for x in tables])  # type: ignore[arg-type]

    def _ranked(self, values: Values, node: fx.Node) -> Values:
        missing = len(shape_of(node)) - values.terms[0].sign.ndim
        return values.map(lambda x: x.reshape((1,) * missing + x.shape)) if missing else values

    def operand(self, node: fx.Node, x: Any, labels: Labels) -> Values | Stuck:
        """An argument of a pointwise op, broadcast to the rank of the result."""
        rank = len(labels)
        if not isinstance(x, fx.Node):
            return self.factors.table(("number", x), (1,) * rank)
        if not isinstance(x.meta["val"], torch.Tensor):
            return self.factors.table(x, (1,) * rank)
        is_real = node.meta["val"].is_complex() and not x.meta["val"].is_complex()
        own = labels_of(x, labels[:-1] if is_real else labels)
        found = self.of(x, own)
        if isinstance(found, Stuck):
            return found
        if found.heads is None:
            self.factors.note(x, own, found)
        if is_real:
            found = found.map(lambda array: array[..., None])
        return self._ranked(found, node)


def _kept(shape: Sequence[Any], labels: Labels) -> tuple[Any, ...]:
    """The shape of the arrays of a tensor: channels alone."""
    return tuple(size if label == CHANNEL else 1 for size, label in zip(shape, labels, strict=True))


# Shapes


def _same(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    return walk.of(node.args[0], labels)


def _copy(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    """Written over all of another tensor."""
    written = node.args[1]
    found = walk.of(written, labels_of(written, labels))
    if isinstance(found, Stuck):
        return found
    shape = _kept(shape_of(node), labels)
    return walk._ranked(found, node).map(lambda x: np.broadcast_to(x, shape))


def _cast(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    """To another float type. What is rounded is another factor; of channels a kernel rounds less."""
    source = node.args[0]
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    found = walk.of(source, labels)
    if before == after or isinstance(found, Stuck):
        return found
    if found.heads is None:
        return walk.factors.pointwise(("cast", after), [found])
    return found if before.is_floating_point and after.is_floating_point else Stuck(f"it is cast to {after}")


def _expand(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    found = walk.of(node.args[0], labels)
    if isinstance(found, Stuck):
        return found
    if found.heads is not None and len(labels_of(node.args[0], labels)) == len(labels):
        lost = [a for a, b in zip(labels, labels_of(node.args[0], labels), strict=True) if a != b and a != CHANNEL]
        if lost:
            return Stuck("heads or rows are repeated")
    shape = _kept(shape_of(node), labels)
    return walk._ranked(found, node).map(lambda x: np.broadcast_to(x, shape))


def _permute(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    rank = node.meta["val"].dim()
    if node.target is aten.permute.default:
        order = [dim % rank for dim in node.args[1]]
    else:
        one, other = (dim % rank for dim in (node.args[1:3] if node.target is aten.transpose.int else (0, rank - 1)))
        order = list(range(rank))
        order[one], order[other] = other, one
    order += range(rank, len(labels))  # the parts of a complex number
    inner: list[Label] = [None] * len(order)
    for dim, source in enumerate(order):
        inner[source] = labels[dim]
    found = walk.of(node.args[0], inner)
    return found if isinstance(found, Stuck) else found.map(lambda x: x.transpose(order))


def _view(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    source = node.args[0]
    shape, before = shape_of(node), shape_of(source)
    axes = [[] if label is None else [Atom((dim,), shape[dim])] for dim, label in enumerate(labels)]
    if any(label is None and not known(size == 1) for label, size in zip(labels, shape, strict=True)):
        return None
    found = regrouped(axes, before)
    if found is None:
        return None
    groups = [[labels[atom.place[0]] for atom in atoms] for atoms in found]
    arrays = _kept(shape, labels)
    if all(set(group) <= {CHANNEL} or len(group) == 1 for group in groups):
        inner = walk.of(source, [group[0] if group else None for group in groups])
        return inner if isinstance(inner, Stuck) else inner.map(lambda x: x.reshape(arrays))
    rows = [label for group in groups[:-1] for label in group]
    if rows not in ([], [ROW], [SAMPLE], [SAMPLE, ROW]) or not set(groups[-1]) <= {HEAD, CHANNEL}:
        return None
    return _heads(source, found[-1], groups[-1], arrays)


def _heads(source: fx.Node, atoms: list[Atom], labels: list[Label], arrays: tuple[int, ...]) -> Result:
    """The view that makes heads of columns."""
    if not all(isinstance(atom.size, int) for atom in atoms):
        return Stuck("the number of heads is no constant")
    stride, columns, of_head, count = 1, np.zeros((), dtype=np.int64), None, 1
    for atom, label in zip(reversed(atoms), reversed(labels), strict=True):
        if label == HEAD:
            of_head, count = stride, atom.size
        else:
            columns = (np.arange(atom.size) * stride).reshape((-1,) + (1,) * columns.ndim) + columns
        stride *= atom.size
    return columns_of(Heads(source, count, stride if of_head is None else of_head), columns.reshape(arrays))


def _projection(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    """One head, which no view has to make."""
    if labels[-1] != CHANNEL or ROW not in labels or not set(labels[:-1]) <= {SAMPLE, ROW, None}:
        return None
    size = node.meta["val"].shape[-1]
    return columns_of(Heads(node, 1, size), np.arange(size, dtype=np.int64).reshape(_kept(shape_of(node), labels)))


def _insert(labels: Labels, dim: int, label: Label) -> list[Label]:
    return [*labels[:dim], label, *labels[dim:]]


def _unsqueeze(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    dim = node.args[1] % node.meta["val"].dim()
    found = walk.of(node.args[0], [*labels[:dim], *labels[dim + 1 :]])
    return found if isinstance(found, Stuck) else found.map(lambda x: np.expand_dims(x, dim))


def _squeeze(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    rank = node.args[0].meta["val"].dim()
    dims = [node.args[1]] if isinstance(node.args[1], int) else node.args[1]
    inner = list(labels)
    for dim in (dims := sorted(dim % rank for dim in dims)):
        inner = _insert(tuple(inner), dim, None)
    found = walk.of(node.args[0], inner)
    return found if isinstance(found, Stuck) else found.map(lambda x: x.squeeze(tuple(dims)))


# Parts


def _slice(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    source, dim = node.args[0], _dim(node, 1)
    start, end, step = (*node.args[2:5], *(None,) * 3)[:3]
    if labels[dim] != CHANNEL:
        whole = known(source.meta["val"].shape[dim] == node.meta["val"].shape[dim])
        return walk.of(source, labels) if whole else None
    if not all(x is None or isinstance(x, int) for x in (start, end, step)):
        return None
    return _indexed(walk, source, labels, (slice(None),) * dim + (slice(start, end, step),))


def _select(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    source, index = node.args[0], node.args[2]
    dim = node.args[1] % source.meta["val"].dim()
    if not isinstance(index, int):
        return None
    return _indexed(walk, source, _insert(labels, dim, CHANNEL), (slice(None),) * dim + (index,))


def _indexed(walk: Channels, source: fx.Node, labels: Sequence[Label], index: tuple[Any, ...]) -> Result:
    found = walk.of(source, labels)
    if isinstance(found, Stuck):
        return None if HEAD not in labels and CHANNEL in labels else found
    return found.map(lambda x: x[index])


def _item(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    many, number = node.args
    if many.target is aten._fused_rms_norm.default and number == 0:
        return _normalised(walk, node, labels)
    if many.target is aten.unbind.int:
        dim = _dim(many, 1, many.args[0])
        return _indexed(walk, many.args[0], _insert(labels, dim, CHANNEL), (slice(None),) * dim + (number,))
    if many.target in (aten.split.Tensor, aten.split_with_sizes.default):
        dim = _dim(many, 2, many.args[0])
        sizes = [part.shape[dim] for part in many.meta["val"]]
        if labels[dim] == CHANNEL and all(isinstance(size, int) for size in sizes):
            first = sum(sizes[:number])
            return _indexed(walk, many.args[0], labels, (slice(None),) * dim + (slice(first, first + sizes[number]),))
    return None


def _cat(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    dim = _dim(node, 1)
    if labels[dim] != CHANNEL:
        return None
    return _joined(walk, node, labels, lambda arrays: np.concatenate(arrays, dim))


def _stack(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    dim = _dim(node, 1)
    if labels[dim] != CHANNEL:
        return None
    return _joined(walk, node, (*labels[:dim], *labels[dim + 1 :]), lambda arrays: np.stack(arrays, dim))


def _joined(walk: Channels, node: fx.Node, labels: Sequence[Label], join: Callable) -> Result:
    parts = []
    for x in node.args[0]:
        if x.meta["val"].dim() != len(labels):
            return None  # the empty tensor of rank 1 that cat ignores
        part = walk.of(x, [label if label != CHANNEL else CHANNEL for label in labels])
        if isinstance(part, Stuck):
            return part
        parts.append(part)
    return joined(parts, join)


def _slice_scatter(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    into, source = node.args[:2]
    dim = _dim(node, 2)
    start, end, step = (*node.args[3:6], *(None,) * 3)[:3]
    if labels[dim] != CHANNEL or not all(x is None or isinstance(x, int) for x in (start, end, step)):
        return None
    return _written(walk, into, source, labels, labels, (slice(None),) * dim + (slice(start, end, step),))


def _select_scatter(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    into, source, _, index = node.args
    dim = _dim(node, 2)
    if labels[dim] != CHANNEL or not isinstance(index, int):
        return None
    inner = (*labels[:dim], *labels[dim + 1 :])
    return _written(walk, into, source, labels, inner, (slice(None),) * dim + (index,))


def _written(walk: Channels, into: fx.Node, source: fx.Node, labels: Labels, inner: Labels, index: tuple) -> Result:
    parts = [walk.of(into, labels), walk.of(source, inner)]
    for part in parts:
        if isinstance(part, Stuck):
            return part

    def write(arrays: list[np.ndarray]) -> np.ndarray:
        result = arrays[0].copy()
        result[index] = arrays[1]
        return result

    return joined(parts, write)  # type: ignore[arg-type]


def _empty(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    return nothing(_kept(shape_of(node), labels))


def _flip(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    dims = tuple(dim % len(labels) for dim in node.args[1])
    found = walk.of(node.args[0], labels)
    if isinstance(found, Stuck) or any(labels[dim] != CHANNEL for dim in dims):
        return None
    return found.map(lambda x: np.flip(x, dims))


def _roll(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    shifts, dims = node.args[1], (*node.args, [])[2]
    found = walk.of(node.args[0], labels)
    if isinstance(found, Stuck) or not dims or any(labels[dim % len(labels)] != CHANNEL for dim in dims):
        return None
    return found.map(lambda x: np.roll(x, shifts, [dim % len(labels) for dim in dims]))


# Arithmetic


def _multiply(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    normalised = _normalised(walk, node, labels)
    if normalised is not None:
        return normalised
    parts = [walk.operand(node, x, labels) for x in node.args[:2]]
    one, other = parts
    if isinstance(one, Stuck) or isinstance(other, Stuck):
        return None
    if node.meta["val"].is_complex():
        return _complex_product(walk, one, other) if _are_complex(node) else walk.factors.product(one, other)
    if one.heads is None and other.heads is None:
        return one if _is_one(node.args[1]) else walk._pointwise(node, labels)
    learned = _learned(walk, node, labels, one, other, "weight")
    if learned is None and _is_scale(node, labels, one, other):
        return None
    return walk.factors.product(one, other) if learned is None else learned


def _is_scale(node: fx.Node, labels: Labels, one: Values, other: Values) -> bool:
    """A number, or the weight of a norm that was not recognised, before anything is rotated."""
    values, operand = (one, node.args[1]) if one.heads is not None else (other, node.args[0])
    if values.heads is None or not values.is_plain:
        return False
    if not isinstance(operand, fx.Node) or not shape_of(operand):
        return True
    own = labels_of(operand, labels)
    return values.heads.labels is not None and own[-1:] == (CHANNEL,) and bool(set(own[:-1]) <= {None})


def _is_one(x: Any) -> bool:
    return not isinstance(x, fx.Node) and x == 1


def _are_complex(node: fx.Node) -> bool:
    return all(isinstance(x, fx.Node) and x.meta["val"].is_complex() for x in node.args[:2])


def _complex_product(walk: Channels, one: Values, other: Values) -> Values | Stuck:
    a, b = ([x.map(operator.itemgetter((..., part))) for part in (0, 1)] for x in (one, other))
    parts = []
    for pairs in (((0, 0, 1), (1, 1, -1)), ((0, 1, 1), (1, 0, 1))):
        products = [walk.factors.product(a[i], b[j]) for i, j, _ in pairs]
        if any(isinstance(x, Stuck) for x in products):
            return products[0]
        total = walk.factors.sum(products[0], products[1], pairs[1][2])  # type: ignore[arg-type]
        if isinstance(total, Stuck):
            return total
        parts.append(total)
    return joined(parts, lambda arrays: np.stack(arrays, -1))


def _add(sign: int) -> Callable[[Channels, fx.Node, Labels], Result]:
    def rule(walk: Channels, node: fx.Node, labels: Labels) -> Result:
        parts = [walk.operand(node, x, labels) for x in node.args[:2]]
        one, other = parts
        if isinstance(one, Stuck) or isinstance(other, Stuck):
            return None
        if (one.heads is None and other.heads is None) or node.kwargs.get("alpha", 1) != 1:
            return None if node.meta["val"].is_complex() else walk._pointwise(node, labels)
        learned = _learned(walk, node, labels, one, other, "bias") if sign == 1 else None
        return walk.factors.sum(one, other, sign) if learned is None else learned

    return rule


def _negate(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    found = walk.of(node.args[0], labels)
    return found if isinstance(found, Stuck) else negated(found)


def _divide(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    normalised = _normalised(walk, node, labels)
    return walk._pointwise(node, labels) if normalised is None else normalised


# Norms


def _normalised(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    """An RMS norm over all channels of each head."""
    found = rms_norm(node)
    if found is None:
        return None
    channels = walk.of(found.source, labels)
    if isinstance(channels, Stuck):
        return channels
    size = found.source.meta["val"].shape[-1]
    heads, columns = channels.heads, channels.terms[0].column
    if heads is not None and len(channels.terms) > 1:
        return Stuck("it is normalised after it is rotated")
    if heads is None or not channels.is_plain or heads.eps is not None or labels[-1] != CHANNEL or size != columns.size:
        return Stuck("an RMS norm is not over the channels of a head as they are projected")
    if heads.count > 1 and size > heads.stride:
        return Stuck("an RMS norm is over several heads")
    return columns_of(Heads(heads.node, heads.count, heads.stride, found.eps, found.weight), columns)


def _learned(
    walk: Channels, node: fx.Node, labels: Labels, one: Values, other: Values, name: str
) -> Values | Stuck | None:
    """The weight or bias of a norm: a number for each channel."""
    values, table = (one, other) if one.heads is not None else (other, one)
    operand = node.args[1 if values is one else 0]
    if values.heads is None or values.heads.eps is None or table.heads is not None or not values.is_plain:
        return None
    if not isinstance(operand, fx.Node) or getattr(values.heads, name) is not None:
        return None
    own = labels_of(operand, labels)
    if own[-1:] != (CHANNEL,) or not set(own[:-1]) <= {None} or values.heads.bias is not None:
        return None
    h = values.heads
    weight, bias = (operand, h.bias) if name == "weight" else (h.weight, operand)
    return columns_of(Heads(h.node, h.count, h.stride, h.eps, weight, bias), values.terms[0].column)


def _dim(node: fx.Node, position: int, of: fx.Node | None = None) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return dim % (node if of is None else of).meta["val"].dim()


def _name(node: fx.Node) -> str:
    target = node.target
    return f"'{target._opname}'" if isinstance(target, torch._ops.OpOverload) else f"the {node.op} {node.name!r}"


_IDLE = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
)
_BY_OP: list[tuple[tuple[Any, ...], Callable[[Channels, fx.Node, Labels], Result]]] = [
    (_IDLE, _same),
    ((aten._to_copy.default,), _cast),
    ((aten.copy.default,), _copy),
    ((aten.expand.default,), _expand),
    ((aten.permute.default, aten.transpose.int, aten.t.default), _permute),
    (VIEWS, _view),
    ((aten.unsqueeze.default,), _unsqueeze),
    ((aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    (PRODUCTS, _projection),
    ((aten.slice.Tensor,), _slice),
    ((aten.select.int,), _select),
    ((operator.getitem,), _item),
    ((aten.cat.default,), _cat),
    ((aten.stack.default,), _stack),
    ((aten.slice_scatter.default,), _slice_scatter),
    ((aten.select_scatter.default,), _select_scatter),
    ((aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default), _empty),
    ((aten.flip.default,), _flip),
    ((aten.roll.default,), _roll),
    (MULTIPLICATIONS, _multiply),
    (DIVISIONS, _divide),
    ((aten.add.Tensor, aten.add.Scalar), _add(1)),
    ((aten.sub.Tensor, aten.sub.Scalar), _add(-1)),
    ((aten.neg.default,), _negate),
]
_RULES: dict[Any, Callable[[Channels, fx.Node, Labels], Result]] = {op: rule for ops, rule in _BY_OP for op in ops}
