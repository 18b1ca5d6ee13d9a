"""From the rows of a sequence to the rows that they are computed from, one op back.

    (B, H, S, D)  ←  transpose, norms, projections, positions  ←  (B, S, C)  ←  flatten  ←  (B, C, T, H, W)

Only ops whose row i is computed from row i have a rule, so a size that happens to equal a length means nothing. Where
a view merges dimensions into the rows, the rows are parts of several dimensions from there on; a `cat` or a slice of
whole rows counts those around them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sgl_npu.passes.axes import Atom, regrouped
from sgl_npu.passes.fx_ops import VIEWS, aten, dimension_argument, permuted_order
from sgl_npu.runtime.sizes import Size, known

Rows = dict[int, list[Atom]]  # the dimensions that hold rows, or parts of them, and what else is merged with these

_ROW = -1  # the place of the atom that is the rows; its parts are at (-1, 0), (-1, 1, 0) and so on


@dataclass(frozen=True)
class Step:
    """Rows of a tensor that rows are computed from, which have `before` and `after` rows around them (or lack them)."""

    node: fx.Node
    rows: Rows
    before: Size = 0
    after: Size = 0

    @property
    def key(self) -> Any:
        """Equal for the same rows of the same tensor."""
        return self.node, tuple((dim, *(atom.place for atom in atoms)) for dim, atoms in sorted(self.rows.items()))

    @property
    def parts(self) -> list[Atom]:
        """The rows, or their parts, in the order of the tensor's dimensions."""
        return [atom for dim in sorted(self.rows) for atom in self.rows[dim] if is_row(atom)]


def whole_rows(node: fx.Node, dim: int) -> Rows:
    """A dimension that is the rows and nothing else."""
    return {dim: [Atom((_ROW,), node.meta["val"].shape[dim])]}


def is_whole(rows: Rows) -> bool:
    """Whether the rows are one dimension, and nothing else is in it."""
    return [atom.place for atoms in rows.values() for atom in atoms] == [(_ROW,)]


def is_row(atom: Atom) -> bool:
    return atom.place[0] == _ROW


def sources(node: fx.Node, rows: Rows) -> list[Step]:
    """The rows that those of a tensor are computed from; none of what has no rule."""
    rule = _RULES.get(node.target)
    if rule is None:
        is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        rule = _aligned if is_pointwise else None
    return [step for step in rule(node, rows) if step.rows] if rule else []


def _aligned(node: fx.Node, rows: Rows) -> Iterator[Step]:
    """Pointwise, with operands that may be broadcast: one that is has no rows, or lacks a part of them."""
    rank = _rank(node)
    for source in _tensors(node):
        shape = source.meta["val"].shape
        at = {dim - rank + len(shape): atoms for dim, atoms in rows.items()}
        kept = {dim: atoms for dim, atoms in at.items() if dim >= 0 and not known(shape[dim] == 1)}
        yield Step(source, _sized(kept, shape))


def _reduced(node: fx.Node, rows: Rows) -> Iterator[Step]:
    """A sum, mean or norm over dimensions that have no rows, which stay as 1."""
    source = node.args[0]
    dims = node.args[_REDUCED[node.target]] if len(node.args) > _REDUCED[node.target] else None
    dims = [dims] if isinstance(dims, int) else dims
    if dims and _rank(source) == _rank(node) and not any(dim % _rank(source) in rows for dim in dims):
        yield Step(source, rows)


def _repeat(node: fx.Node, rows: Rows) -> Iterator[Step]:
    for step in _aligned(node, rows):
        shift = _rank(node) - _rank(step.node)
        pairs = ((step.node.meta["val"].shape[dim], node.meta["val"].shape[dim + shift]) for dim in step.rows)
        if all(known(one == other) for one, other in pairs):
            yield step


def _scatter(node: fx.Node, rows: Rows) -> Iterator[Step]:
    """slice_scatter: into a part of a dimension that has no rows."""
    if dimension_argument(node, 2) not in rows:
        yield from (Step(source, rows) for source in _tensors(node)[:2])


def _view(node: fx.Node, rows: Rows) -> Iterator[Step]:
    source = node.args[0]
    axes = [rows.get(dim, [Atom((dim,), size)]) for dim, size in enumerate(node.meta["val"].shape)]
    axes = [[atom for atom in atoms if not known(atom.size == 1)] for atoms in axes]
    found = regrouped(axes, source.meta["val"].shape)
    if found is not None:
        kept = {dim: atoms for dim, atoms in enumerate(found) if any(map(is_row, atoms))}
        yield Step(source, _sized(kept, source.meta["val"].shape))


def _permute(node: fx.Node, rows: Rows) -> Iterator[Step]:
    order = permuted_order(node)
    yield Step(node.args[0], {order[dim]: atoms for dim, atoms in rows.items()})


def _product(position: int) -> Callable[[fx.Node, Rows], Iterator[Step]]:
    """A matrix product: its rows are those of the first factor."""

    def rule(node: fx.Node, rows: Rows) -> Iterator[Step]:
        source = node.args[position]
        if _rank(node) - 1 not in rows and _rank(source) == _rank(node):
            yield Step(source, rows)

    return rule


def _embedding(node: fx.Node, rows: Rows) -> Iterator[Step]:
    if _rank(node) - 1 not in rows:
        yield Step(node.args[1], rows)


def _last_pair(node: fx.Node, rows: Rows) -> Iterator[Step]:
    """view_as_complex and view_as_real: a last dimension of size 2 goes or comes."""
    if max(rows) < min(_rank(node), _rank(node.args[0])):
        yield Step(node.args[0], rows)


def _stack(node: fx.Node, rows: Rows) -> Iterator[Step]:
    dim = dimension_argument(node, 1)
    if dim not in rows:
        yield from (Step(source, {x - (x > dim): atoms for x, atoms in rows.items()}) for source in node.args[0])


def _select(node: fx.Node, rows: Rows) -> Iterator[Step]:
    dim = dimension_argument(node, 1, node.args[0])
    yield Step(node.args[0], {x + (x >= dim): atoms for x, atoms in rows.items()})


def _cat(node: fx.Node, rows: Rows) -> Iterator[Step]:
    dim = dimension_argument(node, 1)
    parts = [part for part in node.args[0] if _rank(part) == _rank(node)]
    if dim not in rows:
        yield from (Step(part, rows) for part in parts)
        return
    sizes = [part.meta["val"].shape[dim] for part in parts]
    if is_whole(rows):
        for number, part in enumerate(parts):
            yield Step(part, whole_rows(part, dim), sum(sizes[:number]), sum(sizes[number + 1 :]))


def _slice(node: fx.Node, rows: Rows) -> Iterator[Step]:
    dim, source = dimension_argument(node, 1), node.args[0]
    start, step = (node.args[i] if len(node.args) > i else None for i in (2, 4))
    if dim not in rows:
        yield Step(source, rows)
    elif is_whole(rows) and step in (None, 1):
        first = start.meta["val"] if isinstance(start, fx.Node) else start or 0
        size = source.meta["val"].shape[dim]
        yield from _cut(source, dim, size + first if known(first < 0) else first, node.meta["val"].shape[dim])


def _cut(source: fx.Node, dim: int, start: Size, size: Size) -> Iterator[Step]:
    if known(start >= 0):
        yield Step(source, whole_rows(source, dim), -start, start + size - source.meta["val"].shape[dim])


def _item(node: fx.Node, rows: Rows) -> Iterator[Step]:
    """One result of an op that has several."""
    many, number = node.args
    if many.target is aten.unbind.int:
        dim = dimension_argument(many, 1, many.args[0])
        yield Step(many.args[0], {x + (x >= dim): atoms for x, atoms in rows.items()})
    elif many.target in _SPLITS:
        dim = dimension_argument(many, 2, many.args[0])
        if dim not in rows:
            yield Step(many.args[0], rows)
        elif is_whole(rows):
            sizes = [part.shape[dim] for part in many.meta["val"]]
            yield from _cut(many.args[0], dim, sum(sizes[:number]), sizes[number])
    elif many.target in _NORMS and number == 0 and max(rows) < _rank(node) - len(many.args[1]):
        yield Step(many.args[0], rows)


def _sized(rows: Rows, shape: Sequence[Size]) -> Rows:
    """Rows with the sizes as the tensor has them: sizes that are equal, as the op says, may have different formulas."""
    return {dim: [replace(x[0], size=shape[dim])] if len(x) == 1 else x for dim, x in rows.items()}


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()


def _tensors(node: fx.Node) -> list[fx.Node]:
    leaves = pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
    return [x for x in leaves if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)]


_REDUCED = {  # and where their dimensions are among the arguments
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.amax.default: 1,
    aten.var.correction: 1,
    aten.linalg_vector_norm.default: 2,
}
# By the place of the factor that has the rows. Graphs that are traced on an NPU keep `matmul` whole.
_FIRST_FACTOR = (aten.mm.default, aten.bmm.default, aten.matmul.default, aten.linear.default)
_SECOND_FACTOR = (aten.addmm.default, aten.baddbmm.default)
PRODUCTS = (*_FIRST_FACTOR, *_SECOND_FACTOR)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_NORMS = (aten.native_layer_norm.default, aten._fused_rms_norm.default)
_COPIES = (aten._to_copy.default, aten.copy.default, aten.alias.default, aten.detach.default, aten.contiguous.default)
_REGROUPED = (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
_ROWWISE: list[tuple[tuple[Any, ...], Callable[[fx.Node, Rows], Iterator[Step]]]] = [
    ((*_COPIES, aten.lift_fresh_copy.default, aten.expand.default), _aligned),
    (tuple(_REDUCED), _reduced),
    ((aten.repeat.default,), _repeat),
    ((aten.slice_scatter.default,), _scatter),
    (_REGROUPED, _view),
    ((aten.permute.default, aten.transpose.int, aten.t.default), _permute),
    (_FIRST_FACTOR, _product(0)),
    (_SECOND_FACTOR, _product(1)),
    ((aten.embedding.default,), _embedding),
    ((aten.view_as_complex.default, aten.view_as_real.default), _last_pair),
    ((aten.stack.default,), _stack),
    ((aten.select.int,), _select),
    ((aten.cat.default,), _cat),
    ((aten.slice.Tensor,), _slice),
    ((operator.getitem,), _item),
]
_RULES: dict[Any, Callable[[fx.Node, Rows], Iterator[Step]]] = {op: rule for ops, rule in _ROWWISE for op in ops}
