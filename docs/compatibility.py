"""The tables of compatibility.md: `python -m docs.compatibility` writes them into the page.

Which kernel takes which attention is asked of the platforms' own tables, with fake tensors. What was found in which
models is read off the pages that the runs of `benchmarks.coverage` and `benchmarks.serving` wrote.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.coverage.document import RUNS
from benchmarks.readme import Table
from docs.attention_kind import AttentionKind
from docs.tables import filled
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.platforms import PLATFORMS
from sgl_npu.passes.select import REFERENCE_ROWS

DOCS = Path(__file__).parent
PAGE = DOCS / "compatibility.md"
BATCH, HEADS, KEY_HEADS, ROWS = 2, 8, 2, 4096

# Column of the table of kernels: platform, dtype, the device of its tensors.
COLUMNS = {
    "npu, bfloat16": ("npu", torch.bfloat16, "cpu"),
    "npu, float32": ("npu", torch.float32, "cpu"),
    "cpu": ("cpu", torch.float32, "cpu"),
    "cuda": ("cuda", torch.bfloat16, "cuda"),
}


@dataclass(frozen=True)
class Kind(AttentionKind):
    """A row of the table of kernels."""

    rows: int = ROWS
    keys: int = ROWS
    size: int = 128
    value_size: int | None = None
    key_heads: int = KEY_HEADS
    needs_lse: bool = False


KINDS = (
    Kind("no mask"),
    Kind("causal from the top left", upper=0),
    Kind("causal from the bottom right", rows=1024, upper=ROWS - 1024),
    Kind("one query and a cache", rows=1),
    Kind("window of 512 keys", lower=-511, upper=0),
    Kind("padding of keys, `(B, 1, 1, Skv)`", mask=(BATCH, 1, 1, ROWS)),
    Kind("causal and padding", upper=0, mask=(BATCH, 1, 1, ROWS)),
    Kind("any mask, `(B, 1, Sq, Skv)`", mask=(BATCH, 1, ROWS, ROWS)),
    Kind("a mask per head", mask=(1, HEADS, ROWS, ROWS)),
    Kind("bias, one for all heads", bias=(1, 1, ROWS, ROWS)),
    Kind("bias per head (T5, ALiBi, Swin)", bias=(1, HEADS, ROWS, ROWS)),
    Kind("bias and causal", bias=(1, HEADS, ROWS, ROWS), upper=0),
    Kind("sinks (gpt-oss)", sinks=True, upper=0),
    Kind("sinks and a window", sinks=True, lower=-127, upper=0),
    Kind("softcap (Gemma 2)", softcap=50.0, upper=0),
    Kind("lse used (merged blocks, weights)", needs_lse=True),
    Kind("as many key heads as heads", key_heads=HEADS),
    Kind("one key head", key_heads=1),
    Kind("D = 64", size=64),
    Kind("D = 72", size=72),
    Kind("D = 80", size=80),
    Kind("D = 256", size=256),
    Kind("D = 192, Dv = 128 (MLA)", size=192, value_size=128, key_heads=HEADS),
)


def kernels() -> Table:
    """A row per kind of attention: the kernel that each platform takes, or why none of its kernels does."""
    table = [["attention", *COLUMNS]]
    with FakeTensorMode():
        for kind in KINDS:
            table.append([kind.name, *(_taken(_call(kind, *column)) for column in COLUMNS.values())])
    return table


def names() -> Table:
    """A row per kernel: the platforms that have it and the op that it ends in."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for platform in PLATFORMS.values():
        for kernel in platform.forward:
            if kernel.name not in REFERENCE_ROWS:
                rows[kernel.name, kernel.op].append(platform.name)
    return [["kernel", "op", "platforms"], *([f"`{a}`", f"`{b}`", ", ".join(on)] for (a, b), on in rows.items())]


def _call(kind: Kind, platform: str, dtype: torch.dtype, device: str) -> AttentionCall:
    def heads(count: int, length: int, size: int) -> torch.Tensor:
        return torch.empty(BATCH, length, count, size, dtype=dtype, device=device).transpose(1, 2)

    return AttentionCall(
        heads(HEADS, kind.rows, kind.size),
        heads(kind.key_heads, kind.keys, kind.size),
        heads(kind.key_heads, kind.keys, kind.value_size or kind.size),
        **kind.arguments(HEADS, dtype, partial(torch.empty, device=device)),
        scale=kind.size**-0.5,
        needs_lse=kind.needs_lse,
        platform=platform,
    )


def _taken(call: AttentionCall) -> str:
    said: list[str] = []
    for kernel in PLATFORMS[call.platform].forward:
        if not kernel.applies(call):
            continue
        clause = kernel.refuse(call)
        if clause is None:
            reasons = "; ".join(dict.fromkeys(said))
            return f"decomposed: {reasons}" if kernel.name in REFERENCE_ROWS else f"`{kernel.name}`"
        said.append(clause)
    raise AssertionError("the last kernel of a platform takes every call")


# ---------------------------------------------------------------- models


# Pages with a table of families per run; of two that have a run of a family, the first counts.
COVERAGE_PAGES = ("coverage.md", "coverage_bf16.md", "coverage_dynamic.md")
GENERATE = "generate()"


def models() -> Table:
    """A row per family: how many of its hand-written attentions each run found, its masks, and what generate() gave."""
    families: dict[str, dict[str, str]] = defaultdict(dict)
    for page in COVERAGE_PAGES:
        for row in rows_of((DOCS / page).read_text().split("\n## Families\n")[1]):
            for column, cell in row.items():
                if cell and column != "family":
                    families[row["family"]].setdefault(column, cell)
    for row in rows_of((DOCS / "serving.md").read_text().split("<!-- serving -->")[1]):
        families[f"hf/{row['family']}"][GENERATE] = _generated(row)
    columns = [name for name in (*RUNS, "masks", GENERATE) if not name.startswith("Inductor")]
    columns = [name for name in columns if any(name in cells for cells in families.values())]
    return [
        ["family", *columns],
        *([family, *(_short(cells.get(name, "")) for name in columns)] for family, cells in sorted(families.items())),
    ]


def rows_of(text: str) -> list[dict[str, str]]:
    """The first table in a text of Markdown, a dict per row."""
    lines = text[text.index("|") :].splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end])
    return [dict(zip(head, cells, strict=True)) for cells in body]


def _generated(row: dict[str, str]) -> str:
    caches = ("static", "dynamic")
    if all(row[f"{cache}: tokens"] == "same" for cache in caches):
        return "same tokens"
    return "; ".join(f"{cache}: {row[f'{cache}: tokens']}" for cache in caches)


def _short(cell: str) -> str:
    """`all` for "4 of 4"."""
    found, of, count = cell.partition(" of ")
    return "all" if of and found == count else cell


TABLES = {"kernels": kernels, "names": names, "models": models}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE, TABLES))
