"""Numbers as a reader wants them."""

from __future__ import annotations


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


def seconds_text(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"


def change_text(before: int, after: int) -> str:
    """By how much a number has become smaller or larger."""
    if not before or before == after:
        return ""
    return f"{'-' if after < before else '+'}{abs(before - after) / before:.0%}"
