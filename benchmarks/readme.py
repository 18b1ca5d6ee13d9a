"""Tables in benchmarks/README.md: each stands between `<!-- its name -->` and `<!-- end -->`."""

from __future__ import annotations

import re

Table = list[list[str]]


def fill(text: str, stored: dict) -> str:
    """The text with every table of `stored` ({name: {"measured": setting, "rows": table}}) put in its place."""
    for name, table in stored.items():
        block = f"<!-- {name} -->\n{markdown(table['rows'])}\n\nMeasured: {table['measured']}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
    return text


def markdown(rows: Table) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
