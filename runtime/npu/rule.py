"""A rule of a kernel: what it forbids, who says so, and the sentence for the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Call = TypeVar("Call")


@dataclass(frozen=True)
class Rule(Generic[Call]):
    """One limit of a kernel.

    `check` returns None if the call obeys, else a sentence with the value seen and the rule broken.
    A `gate` rule ensures what later rules read (ranks, say): once one is broken, later rules are not asked.
    Sizes may be symbolic; a rule is broken only if the sizes at hand are seen to break it.
    """

    name: str
    source: str
    check: Callable[[Call], str | None]
    gate: bool = False


def broken_rules(call: Call, rules: Sequence[Rule[Call]]) -> list[tuple[Rule[Call], str]]:
    """The rules which `call` breaks, in table order, each with its sentence."""
    broken: list[tuple[Rule[Call], str]] = []
    for rule in rules:
        sentence = rule.check(call)
        if sentence is not None:
            broken.append((rule, sentence))
            if rule.gate:
                break
    return broken


def reject(op: str, call: Call, rules: Sequence[Rule[Call]]) -> None:
    """Raises RuntimeError with the sentences of all rules which the call breaks."""
    broken = broken_rules(call, rules)
    if broken:
        raise RuntimeError(f"{op}: " + "; ".join(sentence for _, sentence in broken))
