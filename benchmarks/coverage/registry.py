"""All cases by name."""

from __future__ import annotations

from functools import cache

from benchmarks.coverage import (
    audio,
    decoders,
    diffusion,
    encoders,
    multimodal,
    plain,
    seq2seq,
    series,
    transformers_row,
    vision,
)
from benchmarks.coverage.case import Case

TABLES = (decoders, encoders, seq2seq, multimodal, vision, audio, series)


@cache
def all_cases() -> dict[str, Case]:
    rows = [row for table in TABLES for row in table.ROWS]
    found = [*plain.cases(), *transformers_row.cases(rows), *diffusion.cases()]
    assert len({case.name for case in found}) == len(found), "two cases have one name"
    return {case.name: case for case in found}


def find_case(name: str) -> Case:
    return all_cases()[name]
