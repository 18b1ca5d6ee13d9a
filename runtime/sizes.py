"""Sizes may be symbolic. Every comparison of sizes goes through here and says whether it may add a guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_int, guard_or_false, statically_known_true

if TYPE_CHECKING:  # torch's own annotations call a SymInt an int
    Size = int
    Condition = bool
else:
    Size = int | torch.SymInt
    Condition = bool | torch.SymBool


def known(condition: Condition) -> bool:
    """True only if the condition holds for every size the graph may meet. Never guards."""
    return statically_known_true(condition)


def guard(condition: Condition) -> bool:
    """The truth of the condition for the sizes at hand, with a guard that recompiles when it changes.

    Sizes without a value at compile time (unbacked) cannot be guarded: the answer is then False.
    """
    return guard_or_false(condition)


def specialise(size: Size) -> int:
    """A size as a plain int, with a guard that recompiles when it changes: for op arguments that cannot be symbolic."""
    return guard_int(size)


def hint(size: Size) -> int:
    """The size at hand, for estimates alone: nothing that is decided by it may be wrong for another. Never guards."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def expression(size: object) -> Any:
    """The formula of torch's symbols that a size is, in sympy; None for a number and for what is no size."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def same_sizes(one: Sequence[Size], other: Sequence[Size]) -> bool:
    """Whether two shapes are known to be equal. Never guards."""
    return len(one) == len(other) and all(known(a == b) for a, b in zip(one, other, strict=True))
