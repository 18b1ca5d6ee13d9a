"""docs/coverage.md from the records of several runs: sorted, so that a new run changes only what has changed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.coverage.exclusions import EXCLUSIONS, NOT_OURS

Record = dict[str, Any]

# The columns, in order: how a run is called, and what it was made with.
RUNS = {
    "static": {"backend": "sgl_npu", "platform": "cpu", "mode": "static", "dtype": "float32"},
    "dynamic": {"backend": "sgl_npu", "platform": "cpu", "mode": "dynamic", "dtype": "float32"},
    "marked dynamic": {"backend": "sgl_npu", "platform": "cpu", "mode": "mark-dynamic", "dtype": "float32"},
    "bf16": {"backend": "sgl_npu", "platform": "cpu", "mode": "static", "dtype": "bfloat16"},
    "bf16 dynamic": {"backend": "sgl_npu", "platform": "cpu", "mode": "dynamic", "dtype": "bfloat16"},
    "npu bf16": {"backend": "sgl_npu", "platform": "npu", "mode": "static", "dtype": "bfloat16"},
    "npu bf16 dynamic": {"backend": "sgl_npu", "platform": "npu", "mode": "dynamic", "dtype": "bfloat16"},
    "npu fp32": {"backend": "sgl_npu", "platform": "npu", "mode": "static", "dtype": "float32"},
    "Inductor static": {"backend": "inductor", "mode": "static", "dtype": "float32"},
    "Inductor dynamic": {"backend": "inductor", "mode": "dynamic", "dtype": "float32"},
}

INTRODUCTION = """# How much attention is found

Tiny, randomly initialised models of many families, run by `python -m benchmarks.coverage`. A *hand-written site* is a
matrix product, a softmax over its last dimension and a product with that, seen while the eager model runs: the count
does not ask any backend. *Found* is what of these is no longer seen while the compiled model runs. *SDPA* are calls of
`F.scaled_dot_product_attention`. Inductor's numbers are those of its own matcher, on the same cases.

A site that no kernel of the platform takes is found, and decomposed again: the report says why. Such sites are listed
as *decomposed*. This page is written by `python -m benchmarks.coverage --write-docs RUN.jsonl ...`."""


def document(records: Iterable[Record]) -> str:
    """The page."""
    records = sorted(records, key=lambda record: record["case"])
    runs = {name: [r for r in records if _belongs(r, made_with)] for name, made_with in RUNS.items()}
    runs = {name: found for name, found in runs.items() if found}
    made = sorted({f"{r['versions']}, seq {r['seq']}, batch {r['batch']}" for r in records if "versions" in r})
    parts = [
        INTRODUCTION,
        "Made with: " + "; ".join(made) + ".",
        "## Summary", _table(["", *runs], _summary_rows(runs)),
        "## Exceptions", "Hand-written sites that are not found, values beyond the tolerance, errors.",
        _table(["case", "run", "found", "why"], _exception_rows(runs)),
        "## Decomposed", "Found, and taken by no kernel of the platform.",
        _table(["family", "run", "sites", "why"], _decomposed_rows(runs)),
        "## What only looks like attention", "Rewritten sites of families that have none to rewrite.",
        _table(["family", *runs], _negative_rows(runs)),
        "## Families", "Hand-written sites found, over all cases of the family.",
        _table(["family", *runs, "masks"], _family_rows(runs)),
        "## Not built here",
        _table(["why", "families"], _exclusion_rows()),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _exclusion_rows() -> list[list[str]]:
    groups = defaultdict(list)
    for family, why in EXCLUSIONS.items():
        groups[why].append(family)
    return [[why, ", ".join(sorted(families))] for why, families in sorted(groups.items())]


def _belongs(record: Record, made_with: dict[str, str]) -> bool:
    return all(record.get(name) == value for name, value in made_with.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return "None."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)


def _family(record: Record) -> str:
    return "/".join(record["case"].split("/")[:2])


def _positive(records: Iterable[Record]) -> list[Record]:
    """The records that were compiled, of families that have attention."""
    return [r for r in records if "matched" in r and not r.get("negative")]


def _found(records: Sequence[Record]) -> str:
    if not records:
        return ""
    return f"{sum(_matched(r) for r in records)} of {sum(r['handwritten'] for r in records)}"


def _matched(record: Record) -> int:
    return min(record["matched"], record["handwritten"])


def _by_family(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups = defaultdict(list)
    for record in records:
        groups[_family(record)].append(record)
    return groups


def _summary_rows(runs: dict[str, list[Record]]) -> list[list[str]]:
    return [
        ["cases", *(str(len(found)) for found in runs.values())],
        ["families", *(str(len(_by_family(found))) for found in runs.values())],
        ["hand-written sites found", *(_found(_positive(found)) for found in runs.values())],
        ["families with hand-written sites, all found", *(_whole_families(found) for found in runs.values())],
        ["SDPA calls captured", *(_captured(found) for found in runs.values())],
        ["median / worst error", *(_errors(found) for found in runs.values())],
        ["values beyond the tolerance", *(_count(found, "numeric") for found in runs.values())],
        ["cases with other sites than expected", *(_surprises(found) for found in runs.values())],
        ["cases whose eager model fails", *(_count(found, "eager_error") for found in runs.values())],
        ["errors, crashes, timeouts", *(_count(found, "compile_error", "crash", "timeout") for found in runs.values())],
        ["graph breaks more than aot_eager", *(str(sum(map(_extra, found))) for found in runs.values())],
        ["cases with a mask of queries x keys left", *(_squares(found) for found in runs.values())],
        ["match and mask, share of the compilation", *(_share(found) for found in runs.values())],
    ]


def _whole_families(records: list[Record]) -> str:
    groups = _by_family(r for r in _positive(records) if r["handwritten"])
    whole = sum(all(_matched(r) == r["handwritten"] for r in group) for group in groups.values())
    return f"{whole} of {len(groups)}"


def _captured(records: list[Record]) -> str:
    known = [r for r in records if "sdpa_sites" in r]
    return f"{sum(r['sdpa_fused'] for r in known)} of {sum(r['sdpa_sites'] for r in known)}" if known else ""


def _errors(records: list[Record]) -> str:
    errors = sorted(r["max_rel"] for r in records if r["status"] == "ok")
    return f"{errors[len(errors) // 2]:.1e} / {errors[-1]:.1e}" if errors else ""


def _count(records: list[Record], *statuses: str) -> str:
    return str(sum(r["status"] in statuses for r in records))


def _surprises(records: list[Record]) -> str:
    known = [r for r in records if r.get("expected") is not None and "handwritten" in r]
    return str(sum(r["handwritten"] + r["sdpa"] != r["expected"] for r in known))


def _extra(record: Record) -> int:
    return max(0, record.get("graph_breaks", 0) - record.get("plain_breaks", record.get("graph_breaks", 0)))


def _squares(records: list[Record]) -> str:
    known = [r for r in records if "square_mask_count" in r]
    return f"{sum(r['square_mask_count'] > 0 for r in known)} of {len(known)}" if known else ""


def _share(records: list[Record]) -> str:
    known = [r for r in records if "pass_s" in r and r.get("compile_s")]
    ours = sum(r["pass_s"]["match"] + r["pass_s"]["mask"] for r in known)
    return f"{100 * ours / sum(r['compile_s'] for r in known):.1f} %" if known else ""


def _ours(runs: dict[str, list[Record]]) -> dict[str, list[Record]]:
    return {name: found for name, found in runs.items() if RUNS[name]["backend"] == "sgl_npu"}


def _exception_rows(runs: dict[str, list[Record]]) -> list[list[str]]:
    rows = []
    for name, records in _ours(runs).items():
        for record in records:
            missing = not record.get("negative") and record.get("matched", 0) < record.get("handwritten", 0)
            if missing or record["status"] not in ("ok", "eager_error"):
                found = _found([record]) if "matched" in record else ""
                rows.append([record["case"], name, found, "; ".join(_reasons(record))])
    return sorted(rows)


def _reasons(record: Record) -> list[str]:
    reasons = []
    if record["status"] == "numeric":
        text = f"error {record['max_rel']:.1e}"
        if "eager_vs_double" in record:
            text += f"; against float64 eager {record['eager_vs_double']:.1e}, ours {record['ours_vs_double']:.1e}"
        reasons.append(text)
    elif record["status"] != "ok":
        first = record.get("error", "").strip().split("\n")[0]
        reasons.append(f"{record['status']}: {first[:200]}".rstrip(": "))
        reasons += filter(None, [NOT_OURS.get((record["case"], record.get("mode") != "static"))])
    refused = {
        re.sub(r"(?<=[a-z])_\d+\b", "", refusal[1])  # "mul_3" is the third such node of a graph
        for site in record.get("sites", [])
        if not site["mask"]
        for refusal in site["refusals"]
    }
    reasons += sorted(refused)
    if not reasons:
        breaks = record.get("graph_breaks", 0)
        reasons.append(f"not seen in one graph: {breaks} graph breaks" if breaks else "not reported")
    return reasons


def _decomposed_rows(runs: dict[str, list[Record]]) -> list[list[str]]:
    rows = []
    for name, records in _ours(runs).items():
        for family, group in sorted(_by_family(records).items()):
            sites = [site for r in group for site in r.get("sites", []) if site["mask"] and not site["fused"]]
            if sites:
                why = sorted({clause for site in sites for _, clause in site["refusals"]})
                rows.append([family, name, str(len(sites)), "; ".join(why)])
    return rows


def _negative_rows(runs: dict[str, list[Record]]) -> list[list[str]]:
    families = sorted({_family(r) for found in runs.values() for r in found if r.get("negative")})
    return [[family, *(_rewritten(found, family) for found in runs.values())] for family in families]


def _rewritten(records: list[Record], family: str) -> str:
    group = [r for r in records if _family(r) == family]
    if not group:
        return ""
    return str(sum(r.get("reported_matched", r.get("matched", 0)) for r in group))


def _family_rows(runs: dict[str, list[Record]]) -> list[list[str]]:
    groups = {name: _by_family(_positive(found)) for name, found in runs.items()}
    families = sorted({family for group in groups.values() for family in group})
    return [
        [
            family,
            *(_found(group.get(family, [])) for group in groups.values()),
            _masks(r for group in groups.values() for r in group.get(family, [])),
        ]
        for family in families
        if any(r["handwritten"] for group in groups.values() for r in group.get(family, []))
    ]


def _masks(records: Iterable[Record]) -> str:
    """What the masks of a family's sites were proved to be, without the numbers of their windows."""
    masks = {site["mask"] for record in records for site in record.get("sites", []) if site["mask"]}
    return ", ".join(sorted({re.sub(r"band\([^)]*\)", "window", mask) for mask in masks}))
