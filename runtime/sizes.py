"""Sizes may be symbolic. Every comparison of sizes goes through here and says whether it may add a guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
