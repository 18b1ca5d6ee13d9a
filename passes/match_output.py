"""From a softmax on to the product of probabilities and value, and to the last view of that product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from sgl_npu.passes.axes import Atom, Axes, axes_of, axes_of_shape, moved, regrouped, view_source
from sgl_npu.passes.constants import is_float_cast
from sgl_npu.passes.fx_ops import VIEWS, aten
from sgl_npu.passes.match_fold import Fold, Lead, fold_between
from sgl_npu.passes.match_guards import Guards, RowStep
from sgl_npu.passes.match_idle import keeps_rows_and_keys
from sgl_npu.passes.match_scores import PRODUCTS, Scores
from sgl_npu.passes.match_softmax import Softmax, divides_by
from sgl_npu.passes.match_terms import Term
from sgl_npu.passes.site import Refusal
from sgl_npu.runtime.sizes import Size, known

_DROPOUTS = ("native_dropout", "dropout", "bernoulli", "rand", "rand_like", "inductor_random")


@dataclass(frozen=True)
class Product:
    """`node` is probabilities · value, or its transpose value · probabilities where `transposed`.

    `steps` are to be taken on the rows of the output; `blanks` are the masks that the probabilities had once more.
    `batch` are the leading dimensions, to which matmul broadcasts its operands.
    """

    node: fx.Node
    value: fx.Node
    transposed: bool
    levels: tuple[tuple[Size, ...], ...]
    batch: tuple[Size, ...]
    fold: Fold | None = None
    steps: tuple[RowStep, ...] = ()
    blanks: tuple[Term, ...] = ()


def read_product(softmax: Softmax, scores: Scores) -> Product | Refusal:
    """The product that the probabilities go into, and nothing else."""
    node: fx.Node = softmax.node
    base: Axes = axes_of(node)
    axes: Axes | None = base
    levels = [tuple(node.meta["val"].shape)]
    sliced, in_place = scores.sinks is None, True
    guards = Guards()
    while True:
        user = guards.next_user(node) if softmax.total is None else _other_user(node, softmax.total)
        if user is None:
            names = ", ".join(repr(user.name) for user in node.users)
            return Refusal(f"the probabilities are used by {names}" if names else "the softmax is not used", node)
        if user.target in PRODUCTS:
            break
        if not sliced and user.target is aten.slice.Tensor and _is_without_sinks(user, scores):
            sliced, base = True, axes_of(user)
            axes = base
        elif view_source(user) is node:
            axes = None if axes is None else moved(axes, user)
        elif not is_float_cast(user) and (
            softmax.total is not None or not in_place or not guards.take(user, node, levels[-1])
        ):
            return Refusal(_reason(user), user)
        node = user
        in_place = axes is not None and keeps_rows_and_keys(base, axes)
        if in_place:
            levels.append(tuple(node.meta["val"].shape))
    if not sliced:
        return Refusal("the column of sinks is not cut off after the softmax", user)
    if (leak := guards.leaked()) is not None:
        return Refusal(f"a test of the probabilities ({leak.name!r}) is used elsewhere", leak)
    found = _oriented(user, node, base, axes, tuple(levels[1:]))
    if isinstance(found, Refusal):
        return found
    if softmax.total is not None:
        return _divided(found, softmax.total)
    return replace(found, steps=tuple(guards.steps), blanks=tuple(guards.blanks))


def _other_user(node: fx.Node, total: fx.Node) -> fx.Node | None:
    others = [user for user in node.users if user is not total]
    return others[0] if len(others) == 1 else None


def _divided(product: Product, total: fx.Node) -> Product | Refusal:
    """The product of exponentials, taken to where it is divided by their sum."""
    node = product.node
    while not product.transposed and len(node.users) == 1:
        user = next(iter(node.users))
        if divides_by(user, node, total):
            return replace(product, node=user)
        if user.target not in VIEWS and not is_float_cast(user):
            break
        node = user
    return Refusal("exponentials of the scores that are not divided by their sum, row by row", node)


def _oriented(user: fx.Node, node: fx.Node, base: Axes, axes: Axes | None, levels: tuple) -> Product | Refusal:
    """The product with the probabilities on its left, rows before keys, or transposed as a whole."""
    left, right = user.args[:2]
    batch = tuple(user.meta["val"].shape[:-2])
    if axes is None or (left is node and right is node):
        return Refusal("the probabilities are reshaped before their product so that keys are taken apart", user)
    if left is node and keeps_rows_and_keys(base, axes):
        return Product(user, right, False, levels, batch)
    if left is node and (fold := fold_between(axes, base)) is not None:
        return Product(user, right, False, levels, batch, fold)
    if right is node and keeps_rows_and_keys(base, [*axes[:-2], axes[-1], axes[-2]]):
        return Product(user, left, True, levels, batch)
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
        return moved_out if same else moved_out.reshape(shape)


def read_result(product: Product, lead: Lead, kv_lead: Lead) -> Result | None:
    """The furthest view of the product that moves whole dimensions of the output."""
    shape = product.node.meta["val"].shape
    rows, columns = shape[-2:][::-1] if product.transposed else shape[-2:]
    start = axes_of_shape((*lead, rows if product.fold is None else product.fold.rows, columns))
    dims: Axes | None = [*start[:2], *(start[2:][::-1] if product.transposed else start[2:])]
    if product.fold is not None:
        dims = product.fold.folded(start, kv_lead)
    axes = None if dims is None else regrouped(dims, shape)
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
    atoms = _joined([atom for dim in axes for atom in dim], start)
    if atoms is None:
        return None
    if atoms == sorted(atoms):
        return (0, 1, 2, 3)
    ones = [dim for dim, parts in enumerate(start) if not parts]
    return (*atoms, *ones)


def _joined(atoms: Sequence[Atom], start: Axes) -> list[int] | None:
    """The dimensions that atoms are, those cut into pieces put together again; None if pieces are apart."""
    found: list[int] = []
    size: Size = 1
    for atom, following in itertools.zip_longest(atoms, atoms[1:]):
        dim = atom.place[0]
        size = size * atom.size
        if following is not None and following.place[0] == dim and atom.place < following.place:
            continue
        if dim in found or not known(size == start[dim][0].size):
            return None
        found.append(dim)
        size = 1
    return found
