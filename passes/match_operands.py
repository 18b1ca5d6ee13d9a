"""Query, key and value of a product as (B, H, S, D), taken from as far up as they already have that shape.

before: x (B, S, H, D) → permute → expand, clone → view (B * H, D, S) → bmm
after:  the permute where it is (B, H, S, D), else a permute and a view of whatever comes closest
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from sgl_npu.passes.axes import Axes, axes_of, axes_of_shape, places, regrouped, through, view_chain
from sgl_npu.passes.constants import CASTS, number
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.match_fold import Fold
from sgl_npu.runtime.sizes import Size, known


@dataclass(frozen=True)
class Operand:
    """`node`, expanded to `wide`, permuted to `order` and viewed as (*lead, rows, columns), is the operand."""

    node: fx.Node
    order: tuple[int, ...]
    shape: tuple[Size, ...]
    wide: tuple[Size, ...] | None = None
    scale: float = 1.0

    def is_permutation(self) -> bool:
        """Whether nothing is to be viewed: the node has the four dimensions, in some order."""
        shape = self.wide or self.node.meta["val"].shape
        same = (known(shape[dim] == size) for dim, size in zip(self.order, self.shape, strict=False))
        return len(shape) == len(self.shape) and all(same)

    def moves(self) -> bool:
        return self.order != tuple(range(len(self.order)))

    def build(self, x: Tensor) -> Tensor:
        x = x if self.wide is None else x.expand(self.wide)
        x = x.permute(self.order) if self.moves() else x
        return x if self.is_permutation() else x.reshape(self.shape)


def find_operand(
    node: fx.Node,
    lead: Sequence[Size],
    transposed: bool,
    scaled: bool = True,
    fold: Fold | None = None,
    batch: Sequence[Size] | None = None,
) -> Operand | None:
    """The operand `node` (…, S, D), or (…, D, S) where `transposed`, as (*lead, S, D); lead has two sizes.

    Widening casts and, where `scaled`, factors that are numbers are taken off. With a `fold`, S has heads in it.
    `batch` are the leading dimensions of the product, which a matmul may broadcast its operand to.
    """
    if batch is not None and is_broadcast(node, batch):
        return _as_operand([node], lead, transposed, fold, (*batch, *node.meta["val"].shape[-2:]))
    operand = _closest(node, lead, transposed, fold)
    scale = 1.0
    while operand is not None and operand.is_permutation() and not operand.moves():
        inner, factor = _unscaled(operand.node)
        if inner is None or (factor != 1.0 and not scaled):
            break
        scale *= factor
        operand = _closest(inner, lead, False)
    return None if operand is None else replace(operand, scale=scale)


def is_broadcast(node: fx.Node, batch: Sequence[Size]) -> bool:
    """Whether a product widens the leading dimensions of its operand `node` to `batch`."""
    own = node.meta["val"].shape[:-2]
    return len(own) != len(batch) or not all(known(a == b) for a, b in zip(own, batch, strict=True))


def _unscaled(node: fx.Node) -> tuple[fx.Node | None, float]:
    """The x of x * number, x / number, or a widening cast of x."""
    if node.target in CASTS and _widens(node):
        return node.args[0], 1.0
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        value = number(node.args[1])
        source = node.args[0]
        same = isinstance(source, fx.Node) and source.meta["val"].shape == node.meta["val"].shape
        if value is not None and 1e-6 < abs(value) < 1e6 and same and "rounding_mode" not in node.kwargs:
            return source, (1.0 / value if "div" in str(node.target) else value)
    return None, 1.0


def _widens(node: fx.Node) -> bool:
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return before.is_floating_point and after.is_floating_point and after.itemsize > before.itemsize


def _closest(node: fx.Node, lead: Sequence[Size], transposed: bool, fold: Fold | None = None) -> Operand | None:
    """The view furthest up that is the operand already; else the nearest that is it but for a permutation."""
    chain = view_chain(node)
    best: Operand | None = None
    for depth in range(len(chain)):
        found = _as_operand(chain[: depth + 1], lead, transposed, fold)
        if found is not None and (best is None or _rank(found, depth) < _rank(best, chain.index(best.node))):
            best = found
    return best


def _rank(operand: Operand, depth: int) -> tuple[bool, bool, int]:
    """Better first: four dimensions, in order, as far up as they are; what must be permuted, as near as it is."""
    return not operand.is_permutation(), operand.moves(), depth if operand.moves() else -depth


def _as_operand(
    chain: Sequence[fx.Node],
    lead: Sequence[Size],
    transposed: bool,
    fold: Fold | None,
    wide: tuple[Size, ...] | None = None,
) -> Operand | None:
    """The operand as a permutation and a view of the last node of `chain`, expanded to `wide` where that is given."""
    source = chain[-1]
    axes = axes_of(source) if wide is None else axes_of_shape(wide)
    found = through(axes, chain)
    if found is None or len(found) < 2:
        return None
    rows, columns = chain[0].meta["val"].shape[-2:][:: -1 if transposed else 1]
    found = [*found[:-2], *(found[-2:][::-1] if transposed else found[-2:])]
    if fold is not None:
        found, rows = fold.unfolded(found), fold.rows
    dims = None if found is None else regrouped(found[:-2], lead)
    if found is None or dims is None:
        return None
    last, sizes = found[-2:], (*lead, rows, columns)
    order = _order(axes, [*dims, *last])
    return None if order is None else Operand(source, order, tuple(sizes), wide)


def _order(axes: Axes, wanted: Axes) -> tuple[int, ...] | None:
    """The permutation of whole dimensions that brings atoms into the wanted order; None if one is taken apart."""
    atoms = places(wanted)
    pairs = list(itertools.pairwise(atoms))
    dims = [place[0] for place in atoms[:1]] + [b[0] for a, b in pairs if a[0] != b[0]]
    if len(set(dims)) < len(dims) or any(a[0] == b[0] and a > b for a, b in pairs):
        return None
    if dims == sorted(dims):
        return tuple(range(len(axes)))
    ones = [dim for dim, parts in enumerate(axes) if not parts]
    slots = list(ones)
    if len(axes) == len(wanted) and [len(dim) for dim in wanted].count(0) == len(ones):
        order = tuple(dim[0].place[0] if dim else slots.pop(0) for dim in wanted)
        if sorted(order) == list(range(len(axes))):
            return order
    return (*dims, *ones)
