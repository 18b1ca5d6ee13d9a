"""Channels through views, copies, casts and parts of tensors: rules of the walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from sgl_npu.passes.axes import Atom, regrouped
from sgl_npu.passes.channel_arithmetic import normalise
from sgl_npu.passes.channel_walk import Channels, Result, kept_shape, labels_of, shape_of
from sgl_npu.passes.channels import (
    CHANNEL,
    HEAD,
    ROW,
    SAMPLE,
    Heads,
    Label,
    Labels,
    Stuck,
    Values,
    columns_of,
    joined,
    nothing,
)
from sgl_npu.passes.fx_ops import aten, dimension_argument, permuted_order, widens
from sgl_npu.runtime.sizes import known


def same(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    return walk.of(node.args[0], labels)


def copy(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    """Written over all of another tensor."""
    written = node.args[1]
    found = walk.of(written, labels_of(written, labels))
    if isinstance(found, Stuck):
        return found
    dtype = node.meta["val"].dtype
    if found.heads is None and written.meta["val"].dtype != dtype:
        found = walk.factors.pointwise(("cast", dtype), [found])
    if found.heads is not None and (_is_repeated(written, labels) or not _keeps_values(found, dtype)):
        return Stuck("it is written into a tensor of another shape or dtype")
    return _broadcast(walk, found, node, labels)


def cast(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    """To another float type. What is rounded is another factor; of channels a kernel rounds less."""
    source = node.args[0]
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    found = walk.of(source, labels)
    if before == after or isinstance(found, Stuck):
        return found
    if found.heads is None:
        return walk.factors.pointwise(("cast", after), [found])
    return found if _keeps_values(found, after) else Stuck(f"it is cast to {after}")


def _keeps_values(values: Values, dtype: torch.dtype) -> bool:
    """Whether a dtype holds what was projected, rounded no more than it is."""
    assert values.heads is not None
    return widens(values.heads.node.meta["val"].dtype, dtype)


def expand(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    found = walk.of(node.args[0], labels)
    if isinstance(found, Stuck):
        return found
    if found.heads is not None and _is_repeated(node.args[0], labels):
        return Stuck("heads or rows are repeated")
    return _broadcast(walk, found, node, labels)


def _broadcast(walk: Channels, values: Values, node: fx.Node, labels: Labels) -> Values:
    shape = kept_shape(shape_of(node), labels)
    return walk.ranked(values, node).map(lambda x: np.broadcast_to(x, shape))


def _is_repeated(source: fx.Node, labels: Labels) -> bool:
    """Whether what is broadcast has fewer heads, rows or samples."""
    own = labels_of(source, labels)
    return [x for x in own if x not in (None, CHANNEL)] != [x for x in labels if x not in (None, CHANNEL)]


def permute(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    order = permuted_order(node)
    order += range(len(order), len(labels))  # the parts of a complex number
    inner: list[Label] = [None] * len(order)
    for dim, source in enumerate(order):
        inner[source] = labels[dim]
    found = walk.of(node.args[0], inner)
    return found if isinstance(found, Stuck) else found.map(lambda x: x.transpose(order))


def view(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    source = node.args[0]
    shape, before = shape_of(node), shape_of(source)
    axes = [[] if label is None else [Atom((dim,), shape[dim])] for dim, label in enumerate(labels)]
    if any(label is None and not known(size == 1) for label, size in zip(labels, shape, strict=True)):
        return None
    found = regrouped(axes, before)
    if found is None or any(len(x.place) > 1 and labels[x.place[0]] != CHANNEL for atoms in found for x in atoms):
        return None
    groups = [[labels[atom.place[0]] for atom in atoms] for atoms in found]
    arrays = kept_shape(shape, labels)
    if all(set(group) <= {CHANNEL} or len(group) == 1 for group in groups):
        inner = walk.of(source, [group[0] if group else None for group in groups])
        return inner if isinstance(inner, Stuck) else inner.map(lambda x: x.reshape(arrays))
    rows = [label for group in groups[:-1] for label in group]
    if rows not in ([], [ROW], [SAMPLE], [SAMPLE, ROW]) or not set(groups[-1]) <= {HEAD, CHANNEL}:
        return None
    return _heads(walk.first(source), found[-1], groups[-1], arrays)


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


def projection(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    """One head, which no view has to make."""
    if labels[-1] != CHANNEL or ROW not in labels or not set(labels[:-1]) <= {SAMPLE, ROW, None}:
        return None
    size = node.meta["val"].shape[-1]
    return columns_of(Heads(node, 1, size), np.arange(size, dtype=np.int64).reshape(kept_shape(shape_of(node), labels)))


def _insert(labels: Labels, dim: int, label: Label) -> list[Label]:
    return [*labels[:dim], label, *labels[dim:]]


def unsqueeze(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    dim = node.args[1] % node.meta["val"].dim()
    found = walk.of(node.args[0], [*labels[:dim], *labels[dim + 1 :]])
    return found if isinstance(found, Stuck) else found.map(lambda x: np.expand_dims(x, dim))


def squeeze(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    rank = node.args[0].meta["val"].dim()
    dims = [node.args[1]] if isinstance(node.args[1], int) else node.args[1]
    shape = node.args[0].meta["val"].shape
    dims = sorted(dim for dim in {dim % rank for dim in dims} if known(shape[dim] == 1))
    if rank - len(dims) != node.meta["val"].dim():
        return None
    inner = list(labels)
    for dim in dims:
        inner = _insert(tuple(inner), dim, None)
    found = walk.of(node.args[0], inner)
    return found if isinstance(found, Stuck) else found.map(lambda x: x.squeeze(tuple(dims)))


def cut(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    source, dim = node.args[0], dimension_argument(node, 1)
    start, end, step = (*node.args[2:5], *(None,) * 3)[:3]
    if labels[dim] != CHANNEL:
        whole = known(source.meta["val"].shape[dim] == node.meta["val"].shape[dim])
        return walk.of(source, labels) if whole else None
    if not all(x is None or isinstance(x, int) for x in (start, end, step)):
        return None
    return _indexed(walk, source, labels, (slice(None),) * dim + (slice(start, end, step),))


def select(walk: Channels, node: fx.Node, labels: Labels) -> Result:
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


def item(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    many, number = node.args
    if many.target is aten._fused_rms_norm.default:
        return normalise(walk, node, labels) if number == 0 else None
    if many.target is aten.unbind.int:
        dim = dimension_argument(many, 1, many.args[0])
        return _indexed(walk, many.args[0], _insert(labels, dim, CHANNEL), (slice(None),) * dim + (number,))
    if many.target in (aten.split.Tensor, aten.split_with_sizes.default):
        dim = dimension_argument(many, 2, many.args[0])
        sizes = [part.shape[dim] for part in many.meta["val"]]
        if labels[dim] == CHANNEL and all(isinstance(size, int) for size in sizes):
            first = sum(sizes[:number])
            return _indexed(walk, many.args[0], labels, (slice(None),) * dim + (slice(first, first + sizes[number]),))
    return None


def concatenate(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    dim = dimension_argument(node, 1)
    if labels[dim] != CHANNEL:
        return None
    return _joined(walk, node, labels, lambda arrays: np.concatenate(arrays, dim))


def stack(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    dim = dimension_argument(node, 1)
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


def slice_scatter(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    into, source = node.args[:2]
    dim = dimension_argument(node, 2)
    start, end, step = (*node.args[3:6], *(None,) * 3)[:3]
    if labels[dim] != CHANNEL or not all(x is None or isinstance(x, int) for x in (start, end, step)):
        return None
    return _written(walk, into, source, labels, labels, (slice(None),) * dim + (slice(start, end, step),))


def select_scatter(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    into, source, _, index = node.args
    dim = dimension_argument(node, 2)
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


def unwritten(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    return nothing(kept_shape(shape_of(node), labels))


def flip(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    dims = tuple(dim % len(labels) for dim in node.args[1])
    found = walk.of(node.args[0], labels)
    if isinstance(found, Stuck) or any(labels[dim] != CHANNEL for dim in dims):
        return None
    return found.map(lambda x: np.flip(x, dims))


def roll(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    shifts, dims = node.args[1], (*node.args, [])[2]
    found = walk.of(node.args[0], labels)
    if isinstance(found, Stuck) or not dims or any(labels[dim % len(labels)] != CHANNEL for dim in dims):
        return None
    return found.map(lambda x: np.roll(x, shifts, [dim % len(labels) for dim in dims]))
