"""What stands between scores and does nothing to their softmax: views, and the subtraction of their maximum."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from sgl_npu.passes.axes import Axes, axes_of, in_order, places, rejoined, through, view_chain, view_source
from sgl_npu.passes.constants import number
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.match_fold import Fold, fold_between
from sgl_npu.passes.site import Refusal
from sgl_npu.runtime.sizes import known

Users = tuple[fx.Node, ...]


def used_elsewhere(node: fx.Node, users: Users) -> Refusal | None:
    other = next((user for user in node.users if user not in users), None)
    return None if other is None else Refusal(f"the scores are used by {other.name!r} too", node)


def without_shift(node: fx.Node, users: Users) -> tuple[fx.Node, Users]:
    """The x of x - max(x, -1), which changes no probability, and the users that x may then have.

    The maximum may be kept from falling under a bound of 0 or less: a smaller shift is as good while exp holds it.
    """
    if node.target is not aten.sub.Tensor or len(node.users) != 1 or node.kwargs.get("alpha", 1) != 1:
        return node, users
    x, top = node.args[:2]
    maximum = top
    while isinstance(maximum, fx.Node) and _keeps_maximum(maximum):
        maximum = maximum.args[0]
    if not isinstance(maximum, fx.Node) or maximum.target not in (aten.amax.default, aten.max.dim):
        return node, users
    dims = maximum.args[1] if isinstance(maximum.args[1], (list, tuple)) else [maximum.args[1]]
    sizes = x.meta["val"].shape
    wanted = (*sizes[:-1], 1)
    shift = top.meta["val"].shape
    same = len(shift) == len(sizes) and all(known(a == b) for a, b in zip(shift, wanted, strict=True))
    is_over_keys = maximum.args[0] is x and [dim % len(sizes) for dim in dims] == [len(sizes) - 1]
    return (x, (node, maximum)) if same and is_over_keys else (node, users)


def _keeps_maximum(node: fx.Node) -> bool:
    if node.target in (aten.clamp.default, aten.clamp_min.default):
        low = number(node.args[1]) if len(node.args) == 2 else None
        return low is not None and low <= 0
    return node.target is operator.getitem or view_source(node) is not None


@dataclass(frozen=True)
class ScoreView:
    """A run of views, outermost first. Inside it rows and keys are `swapped`, or heads are folded into the rows."""

    chain: list[fx.Node]
    swapped: bool = False
    fold: Fold | None = None

    @property
    def plain(self) -> bool:
        return not self.swapped and self.fold is None


def score_views(node: fx.Node) -> ScoreView | Refusal:
    """A run of views, seen as one: rows and keys stay the last two dimensions, the others stay in order."""
    chain = view_chain(node)
    for view in chain[1:-1]:
        if len(view.users) > 1:
            return Refusal("the scores are used in another shape too", view)
    axes = axes_of(chain[-1])
    after = through(axes, chain)
    if keeps_rows_and_keys(axes, after):
        return ScoreView(chain)
    if after is not None and min(len(axes), len(after)) > 1:
        if keeps_rows_and_keys(axes, [*after[:-2], after[-1], after[-2]]):
            return ScoreView(chain, swapped=True)
        if (fold := fold_between(axes, after)) is not None:
            return ScoreView(chain, fold=fold)
    return Refusal("the scores are reshaped or transposed so that rows and keys are not the last dimensions", node)


def keeps_rows_and_keys(before: Axes, after: Axes | None) -> bool:
    """Whether the last two dimensions are what they were and the others are in the order they had."""
    if after is None or min(len(before), len(after)) < 2:
        return False
    pairs = zip(before[-2:], after[-2:], strict=True)
    same = all(places([rejoined(x)]) == places([rejoined(y)]) for x, y in pairs)
    return same and in_order(after)
