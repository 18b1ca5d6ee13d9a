"""Tables in benchmarks/README.md: each stands between `<!-- its name -->` and `<!-- end -->`."""

from __future__ import annotations

import re

Table = list[list[str]]


def fill(text: str, stored: dict) -> str:
    """The text with every table of `stored` ({name: {"measured": setting, "rows": table}}) put in its place."""
    for name, table in stored.items():
        text, _ = put(text, name, f"{markdown(table['rows'])}\n\nMeasured: {table['measured']}")
    return text


def put(text: str, name: str, content: str) -> tuple[str, int]:
    """The text with `content` in the places of that name, and how many there are."""
    block = f"<!-- {name} -->\n{content}\n<!-- end -->"
    return re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _: block, text, flags=re.S)


def put_once(text: str, name: str, content: str, page: str) -> str:
    """The same for a page that has one such place. Raises ValueError where it has none, or several."""
    text, count = put(text, name, content)
    if count != 1:
        raise ValueError(f"{page} has {count} places for the table {name!r}; it should have one")
    return text


def markdown(rows: Table) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
