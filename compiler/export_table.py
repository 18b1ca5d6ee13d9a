"""The manifest of an export as a table: each file, what it is, and its size or that it is not there."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

_UNITS = ("B", "kB", "MB", "GB")


def file_table(manifest: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("file", "what", "size"):
        table.add_column(
            header, overflow="fold", no_wrap=header != "what", justify="right" if header == "size" else "left"
        )
    for row in manifest["files"]:
        table.add_row(*map(Text, (row["file"], row["what"], _size_text(row["size"]))))
    for row in manifest["missing"]:
        table.add_row(Text(row["file"]), Text(row["what"]), Text("not written"))
    return table


def reasons(manifest: dict[str, Any]) -> list[str]:
    """A line per reason, with the files that it kept from being written."""
    files: dict[str, list[str]] = {}
    for row in manifest["missing"]:
        files.setdefault(row["why"], []).append(row["file"])
    return [f"not written: {', '.join(dict.fromkeys(names))}: {why}" for why, names in files.items()]


def _size_text(size: float) -> str:
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
