"""What a driver gives for a captured run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class HostList(NamedTuple):
    """A list of ints that a captured run reads. key: what operators call it, by which an update finds it."""

    key: str
    values: list[int]


class NotCapturable(ValueError):
    """Something that no replay would bring up to date: the message says what, why and what to do."""


@dataclass(frozen=True)
class CapturedGraph:
    """outputs: what the run returned, where every replay writes it again. update: takes the host lists anew."""

    outputs: Any
    replay: Callable[[], object]
    free: Callable[[], object]
    update: Callable[[list[list[int]]], object] | None = None
