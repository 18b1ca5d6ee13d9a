"""Query, key and value of a product as (B, H, S, D), taken from as far up as they already have that shape.

before: x (B, S, H, D) → permute → expand, clone → view (B * H, D, S) → bmm
after:  the permute where it is (B, H, S, D), else a permute and a view of whatever comes closest
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from sgl_npu.passes.axes import Axes, axes_of, inferred, places, regrouped, through, view_chain
from sgl_npu.passes.constants import CASTS, number
from sgl_npu.passes.fx_ops import aten
from sgl_npu.runtime.sizes import Size, known


@dataclass(frozen=True)
class Operand:
    """`node`, permuted to `order` and viewed as (*lead, rows, columns), is the operand."""

    node: fx.Node
    order: tuple[int, ...]
    shape: tuple[Size, ...]
    scale: float = 1.0

    def is_permutation(self) -> bool:
        """Whether nothing is to be viewed: the node has the four dimensions, in some order."""
        shape = self.node.meta["val"].shape
        same = (known(shape[dim] == size) for dim, size in zip(self.order, self.shape, strict=False))
        return len(shape) == len(self.shape) and all(same)

    def moves(self) -> bool:
        return self.order != tuple(range(len(self.order)))

    def build(self, x: Tensor) -> Tensor:
        x = x.permute(self.order) if self.moves() else x
        return x if self.is_permutation() else x.reshape(inferred(self.shape))


def find_operand(node: fx.Node, lead: Sequence[Size], transposed: bool, scaled: bool = True) -> Operand | None:
    """The operand `node` (…, S, D), or (…, D, S) where `transposed`, as (*lead, S, D); lead has two sizes.

    Widening casts and, where `scaled`, factors that are numbers are taken off.
    """
    operand = _closest(node, lead, transposed)
    scale = 1.0
    while operand is not None and operand.is_permutation() and not operand.moves():
        inner, factor = _unscaled(operand.node)
        if inner is None or (factor != 1.0 and not scaled):
            break
        scale *= factor
        operand = _closest(inner, lead, False)
    return None if operand is None else Operand(operand.node, operand.order, operand.shape, scale)


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


def _closest(node: fx.Node, lead: Sequence[Size], transposed: bool) -> Operand | None:
    """The view furthest up that is the operand already; else the nearest that is it but for a permutation."""
    chain = view_chain(node)
    best: Operand | None = None
    for depth in range(len(chain)):
        found = _as_operand(chain[: depth + 1], lead, transposed)
        if found is not None and (best is None or _rank(found, depth) < _rank(best, chain.index(best.node))):
            best = found
    return best


def _rank(operand: Operand, depth: int) -> tuple[bool, bool, int]:
    """Better first: four dimensions, in order, as far up as they are; what must be permuted, as near as it is."""
    return not operand.is_permutation(), operand.moves(), depth if operand.moves() else -depth


def _as_operand(chain: Sequence[fx.Node], lead: Sequence[Size], transposed: bool) -> Operand | None:
    """The operand as a permutation and a view of the last node of `chain`."""
    source = chain[-1]
    axes = axes_of(source)
    found = through(axes, chain)
    if found is None or len(found) < 2:
        return None
    shape = chain[0].meta["val"].shape
    dims = regrouped(found[:-2], lead)
    if dims is None:
        return None
    last = found[-2:][::-1] if transposed else found[-2:]
    sizes = (*lead, *(shape[-2:][::-1] if transposed else shape[-2:]))
    order = _order(axes, [*dims, *last])
    return None if order is None else Operand(source, order, tuple(sizes))


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
