"""Tables in pages of docs/ that are made from the code: each stands between `<!-- its name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.readme import Table, markdown

Tables = Mapping[str, Callable[[], Table]]


def filled(page: Path, tables: Tables) -> str:
    """The text of a page with every table made anew. Raises ValueError where a table has not exactly one place."""
    text = page.read_text()
    for name, rows in tables.items():
        block = f"<!-- {name} -->\n{markdown(rows())}\n<!-- end -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
        if count != 1:
            raise ValueError(f"{page.name} has {count} places for the table {name!r}; it should have one")
    return text
