"""Query, key and value where they are ready to be attended, and the projections that their channels are columns of.

What is nearest to the attention is taken: a key is looked for behind the caches that it is written to, a projection
behind views and slices of whole columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from sgl_npu.passes.channel_walk import Channels, labels_of
from sgl_npu.passes.channels import CHANNEL, HEAD, ROW, SAMPLE, Heads, Labels, Stuck, Values
from sgl_npu.passes.fx_ops import MULTIPLICATIONS, VIEWS, aten, dimension_argument, permuted_order
from sgl_npu.passes.rotary import NOT_ROTATED
from sgl_npu.runtime.sizes import Size, known

_LOGICAL: Labels = (SAMPLE, HEAD, ROW, CHANNEL)


@dataclass(frozen=True)
class Part:
    """Query, key or value where it is ready to be attended: its node, its channels and the projection they are of."""

    node: fx.Node
    labels: Labels
    values: Values
    columns: fx.Node
    first: int

    @property
    def heads(self) -> Heads:
        assert self.values.heads is not None
        return self.values.heads

    @property
    def is_dense(self) -> bool:
        """Whether its heads lie side by side, those of no other between them."""
        return self.heads.count == 1 or self.heads.stride == self.node.meta["val"].shape[-1]

    @property
    def rows(self) -> Size:
        """How many tokens there are in all samples."""
        shape, labels = self.columns.meta["val"].shape, self.heads.labels
        rows: Size = 1
        for dim, size in enumerate(shape[:-1]):
            rows = rows if labels is not None and labels[dim] == HEAD else rows * size
        return rows


def first_part(node: fx.Node, walk: Channels, judge: Callable[[Values], Any]) -> Part | Stuck:
    """The node nearest to the attention that is made of heads in a way that is not judged Stuck."""
    reasons = []
    for source, labels in _candidates(node, labels_of(node, _LOGICAL)):
        values = walk.of(source, labels)
        if isinstance(values, Stuck):
            reasons.append(values)
        elif values.heads is not None and labels[-1] == CHANNEL:
            verdict = judge(values)
            if not isinstance(verdict, Stuck):
                return _part(source, labels, values)
            reasons.append(verdict)
    return next((x for x in reasons if x != NOT_ROTATED), NOT_ROTATED)


def projected_only(values: Values) -> Values | Stuck:
    is_projected = values.range is not None and values.heads is not None and values.heads.labels is None
    return values if is_projected else Stuck("it is no projection as it is")


def _part(node: fx.Node, labels: Labels, values: Values) -> Part:
    assert values.heads is not None
    part = Part(node, labels, values, values.heads.node, first_column(values))
    if not part.is_dense or values.heads.labels is not None:
        return part
    columns, first = _packed(part.columns, part.first)
    return replace(part, columns=columns, first=first)


def first_column(values: Values) -> int:
    """The column where the first head starts."""
    return min(int(term.column[term.sign != 0].min()) for term in values.terms if term.sign.any())


_ROWWISE = {aten.cat.default: 1, aten.slice_scatter.default: 2, aten.index_copy.default: 1}  # where their dimension is
_WRITES = {
    aten.index_copy.default: 3,
    aten.slice_scatter.default: 1,
}
_KEEPS = (aten.clone.default, aten.expand.default, aten._to_copy.default, aten.alias.default)


def _candidates(node: fx.Node, labels: Labels, depth: int = 12) -> Iterator[tuple[fx.Node, Labels]]:
    """A tensor, what it is a multiple of, and what is written into it row by row: a cache, joined or updated."""
    yield node, labels
    if depth == 0 or node.op != "call_function":
        return
    dim = _ROWWISE.get(node.target)
    if dim is not None and _is_last(node, dim):
        return
    if node.target is aten.cat.default:
        parts = [x for x in node.args[0] if x.meta["val"].dim() == len(labels)]
        sources = [(x, labels) for x in reversed(parts)]
    elif node.target in _WRITES:
        sources = [(node.args[_WRITES[node.target]], labels)]
    elif node.target in (aten.transpose.int, aten.permute.default):
        sources = [(node.args[0], _unpermuted(node, labels))]
    elif node.target in _KEEPS or (node.target in MULTIPLICATIONS and _is_number(node.args[1])):
        sources = [(node.args[0], labels)]
    else:
        return
    for source, own in sources:
        if isinstance(source, fx.Node) and source.meta["val"].dim() == len(own):
            yield from _candidates(source, labels_of(source, own), depth - 1)


def _is_number(x: Any) -> bool:
    """A scale, for one, that is a number or a tensor that holds one."""
    return not isinstance(x, fx.Node) or not isinstance(x.meta["val"], Tensor) or x.meta["val"].dim() == 0


def _unpermuted(node: fx.Node, labels: Labels) -> Labels:
    inner = dict(zip(permuted_order(node), labels, strict=True))
    return tuple(inner[dim] for dim in range(len(labels)))


def _packed(node: fx.Node, first: int) -> tuple[fx.Node, int]:
    """The projection of which the columns of a node are a part, and the column where they start."""
    while True:
        if node.target in VIEWS and known(node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]):
            node = node.args[0]
        elif (start := _cut_from(node)) is not None:
            node, first = node.args[0], first + start
        elif isinstance(many := _many(node), fx.Node) and _is_last(many, 2, many.args[0]):
            sizes = [part.shape[-1] for part in many.meta["val"]]
            node, first = many.args[0], first + sum(sizes[: node.args[1]])
        else:
            return node, first


def _cut_from(node: fx.Node) -> int | None:
    """Where a slice of whole columns starts."""
    if node.target is not aten.slice.Tensor or not _is_last(node, 1) or node.args[4:5] not in ((), (1,)):
        return None
    start = (*node.args, None, None)[2] or 0
    return start if isinstance(start, int) and start >= 0 else None


def _many(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    is_split = isinstance(source, fx.Node) and source.target in (aten.split.Tensor, aten.split_with_sizes.default)
    return source if is_split else None


def _is_last(node: fx.Node, position: int, of: fx.Node | None = None) -> bool:
    return dimension_argument(node, position, of) == (node if of is None else of).meta["val"].dim() - 1
