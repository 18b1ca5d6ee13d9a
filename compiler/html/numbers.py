"""Numbers as a reader wants them."""

from __future__ import annotations

import math


def bytes_text(count: int) -> str:
    """1536 as 1.5 KiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError


def count_text(count: float) -> str:
    """1360000 as 1.36 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} "


_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


def seconds_text(seconds: float) -> str:
    unit, size = _unit_of(seconds)
    digits = {"s": 2, "ms": 1}.get(unit, 1 if unit == "µs" and seconds < 10 * size else 0)
    return f"{seconds / size:.{digits}f} {unit}"


def ticks(end: float, count: int) -> list[str]:
    """`count` equal steps from 0 to `end` seconds in one unit, with as many decimals as tell them apart: 0 and more."""
    unit, size = _unit_of(end)
    step = end / count / size
    digits = max(0, 1 - math.floor(math.log10(step)))
    return ["0", *(f"{step * number:.{digits}f} {unit}" for number in range(1, count + 1))]


def _unit_of(seconds: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in _SECONDS if seconds >= size), _SECONDS[-1])


def change_text(before: int, after: int) -> str:
    """By how much a number has become smaller or larger."""
    if not before or before == after:
        return ""
    return f"{'-' if after < before else '+'}{abs(before - after) / before:.0%}"
