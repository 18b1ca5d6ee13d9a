"""What models do to probabilities before their product with the value, and what it is to the output.

where(isnan(p), 0, p)   nan_to_num(p)              nothing: the canonical op gives 0 where no key is left
masked_fill(p, mask, 0)   where(mask, p, 0)        nothing but for rows without a key, if the scores had that mask
p * x   p / x   where(x, p, 0)   x one per row     the same to the output's rows: head masks, padded queries
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from sgl_npu.passes.constants import number
from sgl_npu.passes.fx_ops import DIVISIONS, MULTIPLICATIONS, aten, is_one_per_row, same_shape
from sgl_npu.passes.match_terms import Term, blanked
from sgl_npu.runtime.sizes import Size, known


@dataclass(frozen=True)
class RowStep:
    """`apply(out, x, lse)` on the output's rows: x is the value of `node`, broadcastable to `level`, or a number."""

    node: fx.Node | float
    level: tuple[Size, ...]
    apply: Callable[[Tensor, Tensor | float, Tensor], Tensor]


@dataclass
class Guards:
    """What was met on the way: ops on rows, masks that blank probabilities, and tests for numbers that are none."""

    steps: list[RowStep] = field(default_factory=list)
    blanks: list[Term] = field(default_factory=list)
    tests: set[fx.Node] = field(default_factory=set)
    passed: set[fx.Node] = field(default_factory=set)

    def next_user(self, node: fx.Node) -> fx.Node | None:
        """The one user of probabilities that is no test of them."""
        self.tests |= {user for user in node.users if _is_test(user, node)}
        others = [user for user in node.users if user not in self.tests]
        return others[0] if len(others) == 1 else None

    def take(self, user: fx.Node, node: fx.Node, level: tuple[Size, ...]) -> bool:
        """Whether `user`, an op on the probabilities `node`, is understood; if so it is noted."""
        understood = self._drops_nan(user, node) or self._blanks(user, node, level) or self._scales(user, node, level)
        if understood:
            self.passed.add(user)
        return understood

    def leaked(self) -> fx.Node | None:
        """A test whose result somebody else reads."""
        return next((test for test in self.tests if not set(test.users) <= self.passed), None)

    def _drops_nan(self, user: fx.Node, node: fx.Node) -> bool:
        if user.target is aten.nan_to_num.default:
            return len(user.args) < 2 or user.args[1] in (None, 0.0)
        if user.target is not aten.where.self or user.args[2] is not node or user.args[0] not in self.tests:
            return False
        return user.args[0].target is aten.eq.Scalar or number(user.args[1]) == 0.0

    def _blanks(self, user: fx.Node, node: fx.Node, level: tuple[Size, ...]) -> bool:
        found = blanked(user)
        if found is None or found.rest is not node or not same_shape(user, node):
            return False
        condition, kept = found.condition, not found.forbids
        if not known(condition.meta["val"].dim() > 0 and condition.meta["val"].size(-1) == 1):
            self.blanks.append(found.term(level))
            return True
        self.steps.append(RowStep(condition, level, lambda out, x, lse: _keep_rows(out, x, kept)))
        return True

    def _scales(self, user: fx.Node, node: fx.Node, level: tuple[Size, ...]) -> bool:
        divides = user.target in DIVISIONS and "rounding_mode" not in user.kwargs
        if not divides and user.target not in MULTIPLICATIONS:
            return False
        x = user.args[1] if user.args[0] is node else user.args[0]
        if x is node or not same_shape(user, node) or (divides and user.args[0] is not node):
            return False
        value = number(x)
        if value is None and not (isinstance(x, fx.Node) and _holds_one_per_row(x)):
            return False
        self.steps.append(RowStep(x if value is None else value, level, _divide if divides else _multiply))
        return True


def _is_test(user: fx.Node, node: fx.Node) -> bool:
    """isnan(p), p != p, p == inf, p == -inf."""
    if user.target is aten.isnan.default or (user.target is aten.ne.Tensor and user.args[0] is user.args[1]):
        return True
    return user.target is aten.eq.Scalar and user.args[0] is node and user.args[1] in (float("inf"), float("-inf"))


def _holds_one_per_row(x: fx.Node) -> bool:
    value = x.meta["val"]
    return isinstance(value, Tensor) and is_one_per_row(value)


def _multiply(out: Tensor, x: Tensor | float, lse: Tensor) -> Tensor:
    return out * x


def _divide(out: Tensor, x: Tensor | float, lse: Tensor) -> Tensor:
    return out / x


def _keep_rows(out: Tensor, condition: Tensor | float, kept: bool) -> Tensor:
    assert isinstance(condition, Tensor)
    zero = torch.zeros((), dtype=out.dtype, device=out.device)
    return torch.where(condition, out, zero) if kept else torch.where(condition, zero, out)


def without_share(out: Tensor, sink: Tensor | float, lse: Tensor) -> Tensor:
    """What is left of the output if a score beside the others, one per row, takes its share of the softmax."""
    return out * torch.sigmoid(lse.unsqueeze(-1) - sink)
