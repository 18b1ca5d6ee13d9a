"""The tables of parallelism.md, made from the code: `python -m docs.parallelism` writes them into the page.

What a scheme does with an attention is read from the graph that it is traced to, on four ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.readme import Table
from docs.attention_kind import AttentionKind
from docs.tables import filled
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sequence import SCHEMES, gathered_attention
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh

PAGE = Path(__file__).with_name("parallelism.md")
RANKS, BATCH, HEADS, KEY_HEADS, SIZE, LENGTH = 4, 1, 32, 8, 128, 16384
DTYPE = torch.bfloat16

# Column of the table of attentions: scheme, blocks x ulysses.
COLUMNS = {
    f"ulysses={RANKS}": ("ulysses", (1, RANKS)),
    f"ring={RANKS}": ("ring", (RANKS, 1)),
    f"kv_gather={RANKS}": ("kv_gather", (RANKS, 1)),
    "ring=2, ulysses=2": ("ring", (2, 2)),
}


@dataclass(frozen=True)
class Kind(AttentionKind):
    """A row of the table of attentions; `zigzag` is what `placement="auto"` chooses."""

    segments: tuple[int, ...] = (LENGTH,)
    keys: tuple[int, ...] | None = None
    everywhere: bool = False
    heads: int = HEADS
    key_heads: int = KEY_HEADS
    zigzag: bool = False


KINDS = (
    Kind("full"),
    Kind("causal, in zigzag", upper=0, zigzag=True),
    Kind('causal, rows in order (`placement="contiguous"`)', upper=0),
    Kind("window of 4096 keys", lower=-4095, upper=0),
    Kind("padding of keys, `(B, 1, 1, S)`", mask=(BATCH, 1, 1, LENGTH)),
    Kind("packed documents, any mask of `S x S`", mask=(BATCH, 1, LENGTH, LENGTH)),
    Kind("bias per head", bias=(1, HEADS, LENGTH, LENGTH)),
    Kind("sinks and softcap", sinks=True, softcap=30.0),
    Kind("text and image joined", segments=(512, LENGTH - 512)),
    Kind("cross attention, keys on every rank", keys=(512,), everywhere=True),
    Kind("cross attention, keys sharded", keys=(512,)),
    Kind("fewer key heads than ranks (32 and 2)", key_heads=2),
    Kind("heads that the ranks do not divide (30 and 10)", heads=30, key_heads=10),
    Kind("fewer query heads than ranks (1)", heads=1, key_heads=1),
    Kind("length that the ranks do not divide (16381)", segments=(LENGTH - 3,)),
    Kind("the same, causal in zigzag", segments=(LENGTH - 3,), upper=0, zigzag=True),
)

MESSAGES = {
    torch.ops._c10d_functional.all_to_all_single.default: "all-to-all",
    torch.ops._c10d_functional.all_gather_into_tensor.default: "all-gather",
    torch.ops.sgl_npu.ring_shift.default: "shift",
}


def page() -> str:
    """The page with its tables made anew."""
    return filled(PAGE, TABLES)


def schemes() -> Table:
    """The rows of `SCHEMES`: what each sends."""
    head = ["scheme", "collectives per attention", "elements that a rank sends"]
    return [head, *([f"`{x.name}`", x.collectives, f"`{x.formula}`"] for x in SCHEMES.values())]


def attentions() -> Table:
    """What every scheme does with every kind of attention, or why it does not."""
    rows = [["attention", *(f"`{column}`" for column in COLUMNS)]]
    for kind in KINDS:
        rows.append([kind.name, *(_served(kind, scheme, degrees) for scheme, degrees in COLUMNS.values())])
    return rows


def _served(kind: Kind, name: str, degrees: tuple[int, int]) -> str:
    mesh = SequenceMesh(*(Axis(size, "ranks") for size in (*degrees, RANKS)))
    blocks, pieces = degrees
    layout = SequenceLayout(kind.segments, blocks, pieces, kind.zigzag and blocks > 1)
    key_layout = layout if kind.keys is None else SequenceLayout(kind.keys, blocks, pieces)
    key_rows = key_layout.length if kind.everywhere else key_layout.local_length
    call = _call(kind, layout.local_length, key_rows)
    if kind.everywhere:
        return _text(call, lambda call, ranks: gathered_attention(call, layout, ranks), 0)
    refused = SCHEMES[name].refuse(call, layout, key_layout, mesh)
    if refused is not None:
        return f"no: {refused}"
    sent = SCHEMES[name].bytes(call, layout, key_layout, mesh)
    return _text(call, lambda call, ranks: SCHEMES[name].emit(call, layout, key_layout, mesh, ranks), sent)


def _call(kind: Kind, rows: int, key_rows: int) -> AttentionCall:
    empty = partial(torch.empty, device="meta")
    return AttentionCall(
        empty((BATCH, kind.heads, rows, SIZE), dtype=DTYPE),
        empty((BATCH, kind.key_heads, key_rows, SIZE), dtype=DTYPE),
        empty((BATCH, kind.key_heads, key_rows, SIZE), dtype=DTYPE),
        **kind.arguments(kind.heads, DTYPE, empty),
    )


def _text(call: AttentionCall, emit: Callable[[AttentionCall, torch.Tensor], Any], sent: int) -> str:
    """`3 shifts, 48 MiB; 4 calls`: the messages and the attentions of a graph."""
    ranks = torch.empty(2, dtype=torch.int64, device="meta")
    graph = make_fx(lambda ranks: emit(call, ranks)[0])(ranks).graph
    messages = Counter(MESSAGES[node.target] for node in graph.nodes if node.target in MESSAGES)
    said = ", ".join(
        f"{count} {name}{'s' if name == 'shift' and count > 1 else ''}" for name, count in messages.items()
    )
    said = f"{said}, {sent / 2**20:.4g} MiB" if said else "no message"
    calls = [node for node in graph.nodes if node.target is attention]
    masked = sum(map(_has_row_mask, calls))
    which = "" if not masked else " with masks" if masked == len(calls) else f", {masked} with masks"
    return f"{said}; {len(calls)} call{'s' if len(calls) > 1 else ''}{which}"


def _has_row_mask(node: fx.Node) -> bool:
    """Whether an attention has a mask with a row for every query."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("mask")
    return mask is not None and mask.meta["val"].dim() > 1 and mask.meta["val"].size(-2) > 1


TABLES: dict[str, Callable[[], Table]] = {"schemes": schemes, "attentions": attentions}

if __name__ == "__main__":
    PAGE.write_text(page())
