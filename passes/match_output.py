"""From a softmax on to the product of probabilities and value, and to the last view of that product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from sgl_npu.passes.axes import Axes, axes_of, axes_of_shape, in_order, inferred, moved, places, regrouped, view_source
from sgl_npu.passes.constants import CASTS
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.match_idle import keeps_rows_and_keys
from sgl_npu.passes.match_scores import PRODUCTS, Scores
from sgl_npu.passes.site import Refusal
from sgl_npu.runtime.sizes import Size, known

_DROPOUTS = ("native_dropout", "dropout", "bernoulli", "rand", "rand_like", "inductor_random")


@dataclass(frozen=True)
class Product:
    """`node` is probabilities · value, or its transpose value · probabilities where `transposed`."""

    node: fx.Node
    value: fx.Node
    transposed: bool
    levels: tuple[tuple[Size, ...], ...]


def read_product(softmax: fx.Node, scores: Scores) -> Product | Refusal:
    """The product that the probabilities go into, and nothing else."""
    node: fx.Node = softmax
    base: Axes = axes_of(node)
    axes: Axes | None = base
    levels = []
    sliced = scores.sinks is None
    while True:
        if len(node.users) != 1:
            names = ", ".join(repr(user.name) for user in node.users)
            return Refusal(f"the probabilities are used by {names}" if names else "the softmax is not used", node)
        (user,) = node.users
        if user.target in PRODUCTS:
            break
        if not sliced and user.target is aten.slice.Tensor and _is_without_sinks(user, scores):
            sliced, base = True, axes_of(user)
            axes = base
        elif view_source(user) is node:
            axes = None if axes is None else moved(axes, user)
        elif not (user.target in CASTS and user.meta["val"].is_floating_point()):
            return Refusal(_reason(user), user)
        node = user
        if axes is not None and keeps_rows_and_keys(base, axes):
            levels.append(tuple(node.meta["val"].shape))
    if not sliced:
        return Refusal("the column of sinks is not cut off after the softmax", user)
    return _oriented(user, node, base, axes, tuple(levels))


def _oriented(user: fx.Node, node: fx.Node, base: Axes, axes: Axes | None, levels: tuple) -> Product | Refusal:
    """The product with the probabilities on its left, rows before keys, or transposed as a whole."""
    left, right = user.args[:2]
    if axes is None or (left is node and right is node):
        return Refusal("the probabilities are reshaped before their product so that keys are taken apart", user)
    if left is node and keeps_rows_and_keys(base, axes):
        return Product(user, right, False, levels)
    if right is node and keeps_rows_and_keys(base, [*axes[:-2], axes[-1], axes[-2]]):
        return Product(user, left, True, levels)
    return Refusal("the product does not sum over the dimension of the softmax", user)


def _is_without_sinks(node: fx.Node, scores: Scores) -> bool:
    """The slice that keeps the columns of the scores and drops that of the sinks."""
    rank = node.meta["val"].dim()
    defaults: list[Any] = [0, None, None, 1]
    dim, start, _, step = list(node.args[1:]) + defaults[len(node.args) - 1 :]
    start = start.meta["val"] if isinstance(start, fx.Node) else start or 0
    if dim % rank != rank - 1 or step != 1 or not known(node.meta["val"].size(-1) == scores.levels[0][-1]):
        return False
    return known(start == int(scores.sinks_first))


def _reason(user: fx.Node) -> str:
    name = getattr(user.target, "_opname", user.name)
    if any(word in name for word in _DROPOUTS):
        return "dropout of the probabilities: the canonical op has none"
    if "mul" in name:
        return f"the probabilities are multiplied ({user.name!r}) before their product with the value"
    return f"the probabilities go into {name!r}, not into a product with the value"


@dataclass(frozen=True)
class Result:
    """`node`, the last view of the product, is the output (B, H, S, Dv) permuted to `order` and viewed as `shape`."""

    node: fx.Node
    order: tuple[int, ...]

    def build(self, out: Tensor) -> Tensor:
        shape = self.node.meta["val"].shape
        moved_out = out if self.order == (0, 1, 2, 3) else out.permute(self.order)
        same = len(shape) == 4 and all(known(a == b) for a, b in zip(moved_out.shape, shape, strict=True))
        return moved_out if same else moved_out.reshape(inferred(shape))


def read_result(product: Product, lead: tuple[Size, Size]) -> Result | None:
    """The furthest view of the product that moves whole dimensions of the output."""
    shape = product.node.meta["val"].shape
    rows, columns = shape[-2:][::-1] if product.transposed else shape[-2:]
    start = axes_of_shape((*lead, rows, columns))
    dims = [*start[:2], *(start[2:][::-1] if product.transposed else start[2:])]
    axes = regrouped(dims, shape)
    node, best = product.node, None
    while axes is not None:
        order = _whole(axes, start)
        best = best if order is None else Result(node, order)
        user = next(iter(node.users), None)
        if len(node.users) != 1 or user is None or view_source(user) is not node:
            break
        node, axes = user, moved(axes, user)
    return best


def _whole(axes: Axes, start: Axes) -> tuple[int, ...] | None:
    """The order of the output's dimensions in a view of it; None where one is taken apart."""
    found = [place[0] for place in places(axes)]
    if any(len(place) > 1 for place in places(axes)):
        return None
    if in_order(axes):
        return (0, 1, 2, 3)
    ones = [dim for dim, atoms in enumerate(start) if not atoms]
    return (*found, *ones)
