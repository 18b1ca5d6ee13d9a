"""Two compiled forms of one graph, of which every call runs one; nothing is compiled again to change over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Condition = Callable[[Sequence[Any]], bool]


def by_condition(first: Callable, other: Callable, holds: Condition) -> Callable:
    """The first form where the condition holds of the inputs. What is returned takes them as a list it may empty."""
    return by_reading(first, other, lambda args: [] if holds(args) else None)


def by_reading(first: Callable, other: Callable, read: Callable[[Sequence[Any]], Sequence[Any] | None]) -> Callable:
    """The first form, with what is read from the inputs behind them; the other one where that is None."""

    def run(args: list[Any]) -> Any:
        further = read(args)
        compiled = other if further is None else first
        given = [*args, *(further or ())]
        args.clear()
        return compiled(given) if getattr(compiled, "_boxed_call", False) else compiled(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
