"""A run in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


def line(record: dict[str, Any]) -> str:
    """One case."""
    parts = [f"{record['case']:45}", f"{record['status']:13}"]
    if "handwritten" in record:
        parts.append(f"found {record.get('matched', '-')} of {record['handwritten']}, sdpa {record['sdpa']}")
    if "max_rel" in record:
        parts.append(f"error {record['max_rel']:.1e}")
    if record.get("graph_breaks"):
        parts.append(f"breaks {record['graph_breaks']}")
    if record.get("square_mask_count"):
        parts.append(f"S x S left {record['square_mask_count']}")
    if "error" in record:
        parts.append(record["error"].replace("\n", " ")[:160])
    return "  ".join(parts)


def summary(records: Iterable[dict[str, Any]]) -> str:
    records = list(records)
    compiled = [record for record in records if "matched" in record and not record["negative"]]
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(Counter(r["status"] for r in records).items()))
    found = sum(record["matched"] for record in compiled)
    return (
        f"{len(records)} cases of {len({r['case'].split('/')[1] for r in records})} families: {statuses}\n"
        f"hand-written sites found: {found} of {sum(record['handwritten'] for record in compiled)}"
    )
