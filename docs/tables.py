"""Tables in pages of docs/ that are made from the code: each stands between `<!-- its name -->` and `<!-- end -->`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.readme import Table, markdown, put_once

Tables = Mapping[str, Callable[[], Table]]


def filled(page: Path, tables: Tables) -> str:
    """The text of a page with every table made anew. Raises ValueError where a table has not exactly one place."""
    text = page.read_text()
    for name, rows in tables.items():
        text = put_once(text, name, markdown(rows()), page.name)
    return text
