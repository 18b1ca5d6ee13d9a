"""The tables of docs/serving.md, from what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.readme import Table, markdown, put_once
from benchmarks.serving.families import families
from benchmarks.serving.generation import CACHES

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
BOUND = 2  # a prefill and a step of decoding

# Why Dynamo compiled again, by what its guard reads; in transformers 5.23 or torch 2.13, not in a backend.
CAUSES = (
    (r"cumulative_length(_int)?\b|sliding_window", "a window's cache counts its tokens in a Python integer"),
    (r"\.(keys|values)' size mismatch", "a window's cache grows until the window is full, and then no more"),
    (r"has_previous_state|conv_states|recurrent_states", "the state of a linear attention is made by the prompt"),
)
_EXPECTED = re.compile(r"is_initialized == False|'?kwargs\['input_ids'\]'? size mismatch")

Rows = dict[str, dict[str, Any]]


def write_page(stored: dict[str, Any]) -> None:
    PAGE.write_text(page(PAGE.read_text(), stored))


def page(text: str, stored: dict[str, Any]) -> str:
    """The text with every table, between `<!-- its name -->` and `<!-- end -->`, made anew."""
    rows = stored["families"]
    tables = {"serving_summary": summary(rows), "serving": by_family(rows), "serving_exceptions": exceptions(rows)}
    for name, table in tables.items():
        text = put_once(text, name, f"{markdown(table)}\n\nMeasured: {stored['measured']}", PAGE.name)
    return text


def summary(rows: Rows) -> Table:
    found = {cache: [row[cache] for row in rows.values()] for cache in CACHES}
    ran = {cache: [row for row in cells if "error" not in row] for cache, cells in found.items()}
    lines = {
        "families measured": lambda cache: f"{len(found[cache])} of {len(families())}",
        "generate() runs": lambda cache: len(ran[cache]),
        "the same tokens": lambda cache: sum(not row["differ"] for row in ran[cache]),
        "one graph for the prompt, one for decoding": lambda cache: sum(row["graphs"] <= BOUND for row in ran[cache]),
        "more graphs than `aot_eager`": lambda cache: sum(_more_than_plain(row) for row in ran[cache]),
    }
    return [["", *CACHES], *([name, *(str(value(cache)) for cache in CACHES)] for name, value in lines.items())]


def _more_than_plain(row: dict[str, Any]) -> bool:
    return row["graphs"] > row.get("plain_graphs", BOUND)


def by_family(rows: Rows) -> Table:
    columns = [f"{cache}: {what}" for cache in CACHES for what in ("tokens", "graphs")]
    return [["family", *columns], *([family, *_cells(row)] for family, row in rows.items())]


def _cells(row: dict[str, Any]) -> Iterator[str]:
    for cache in CACHES:
        cell = row[cache]
        if "error" in cell:
            yield from ("fails", "-")
        else:
            yield "other" if cell["differ"] else "same"
            plain = f" (plain {cell['plain_graphs']})" if "plain_graphs" in cell else ""
            yield f"{cell['graphs']}{plain}"


def exceptions(rows: Rows) -> Table:
    table = [["family", "cache", "what", "why"]]
    for family, row in rows.items():
        for cache in CACHES:
            table += [[family, cache, *words] for words in _exceptions(row[cache])]
    return table


def _exceptions(cell: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "error" in cell:
        yield "fails", cell["error"]
        return
    if cell["differ"]:
        yield "other tokens", cell["differ"]
    if cell["graphs"] > BOUND:
        causes = [f"a break: {reason}" for reason in cell["breaks"]]
        causes += [cause for reason in cell["recompiled"] if not cell["breaks"] and (cause := _cause(reason))]
        yield f"{cell['graphs']} graphs", "; ".join(dict.fromkeys(causes)).replace("|", "\\|")


def _cause(reason: str) -> str:
    if _EXPECTED.search(reason):
        return ""
    return next((cause for pattern, cause in CAUSES if re.search(pattern, reason)), f"`{reason}`")
