"""Limits of the fused infer attention operator: lists of sequence lengths, and paged key/value caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_npu.runtime.npu.fia_call import FiaCall
from sgl_npu.runtime.npu.fia_rules import dtype_name
from sgl_npu.runtime.npu.rule import Rule
from sgl_npu.runtime.npu.sources import DOCS_V1, DOCS_V2, TILING
from sgl_npu.runtime.sizes import Size, guard

MAX_SEQUENCES = 4096
MAX_CACHE_HIDDEN = 65535
MAX_DECODE_CACHE = 2**31 - 1


def _batched_list_sizes(call: FiaCall) -> str | None:
    if call.packed:
        return None
    for name, given in (
        ("actual_seq_lengths", None if call.decode else call.actual_seq_lengths),
        ("actual_seq_lengths_kv", call.actual_seq_lengths_kv),
    ):
        if given is not None and len(given) != 1 and (not given or guard(len(given) < call.batch)):
            return f"{name} has {len(given)} entries; it takes 1, or B = {call.batch} and more"
    return None


def _batched_list_values(call: FiaCall) -> str | None:
    if call.packed:
        return None
    for rows, keys in call.lengths:
        for name, length, full in (("S1", rows, call.q.length), ("S2", keys, call.k.length)):
            if guard(length < 0) or guard(length > full):
                return f"a sequence has length {length}, not in 0..{name} = {full}"
    return None


def _packed_lists_given(call: FiaCall) -> str | None:
    if not call.packed:
        return None
    queries, keys = call.actual_seq_lengths, call.actual_seq_lengths_kv
    if queries is None or keys is None:
        return f"layout {call.layout} needs actual_seq_lengths and actual_seq_lengths_kv"
    if len(queries) != len(keys):
        return f"actual_seq_lengths has {len(queries)} entries but actual_seq_lengths_kv has {len(keys)}"
    if not 0 < len(queries) <= MAX_SEQUENCES:
        return f"actual_seq_lengths has {len(queries)} entries, not in 1..{MAX_SEQUENCES}"
    return None


def _ends(name: str, ends: Sequence[Size], total: Size) -> str | None:
    for start, end in zip((0, *ends), ends, strict=False):
        if guard(end < start):
            return f"{name} goes down from {start} to {end}; it lists the ends of the sequences"
    if guard(ends[-1] != total):
        return f"{name} ends at {ends[-1]}, not at the {total} tokens"
    return None


def _packed_ends(call: FiaCall) -> str | None:
    if not call.packed:
        return None
    assert call.actual_seq_lengths is not None and call.actual_seq_lengths_kv is not None
    return _ends("actual_seq_lengths", call.actual_seq_lengths, call.q.length) or (
        None if call.paged else _ends("actual_seq_lengths_kv", call.actual_seq_lengths_kv, call.k.length)
    )


def _paged_lengths(call: FiaCall) -> str | None:
    if not call.paged:
        return None
    if call.actual_seq_lengths_kv is None:
        return "block_table needs actual_seq_lengths_kv"
    for keys in call.actual_seq_lengths_kv:
        if guard(keys < 0) or guard(keys > call.k.length):
            return f"a sequence has {keys} keys; the table holds {call.k.length}"
    return None


def _table(call: FiaCall) -> str | None:
    if call.block_table is None:
        return None
    if call.block_table_dtype != torch.int32:
        return f"block_table is {dtype_name(call.block_table_dtype)}; it must be int32"
    if guard(call.block_table[0] != call.batch):
        return f"block_table has {call.block_table[0]} rows; it must have B = {call.batch}"
    return None


def _block_size(call: FiaCall) -> str | None:
    if not call.paged:
        return None
    multiple, highest = (16, 1024) if call.packed else (16, 512) if call.decode else (128, 512)
    if not 0 < call.block_size <= highest or call.block_size % multiple:
        return f"block_size = {call.block_size} is not a multiple of {multiple} in {multiple}..{highest}"
    return None


def _cache(call: FiaCall) -> str | None:
    if not call.paged:
        return None
    axis = 1 if len(call.key) == 3 else 2
    if guard(call.key[axis] != call.block_size):
        return f"the cache is {call.key}; its blocks must have block_size = {call.block_size} rows"
    if len(call.key) == 3 and guard(call.key[2] > MAX_CACHE_HIDDEN):
        return f"Nk * D = {call.key[2]} of the cache exceeds {MAX_CACHE_HIDDEN}"
    if len(call.key) == 4 and call.axes not in ("BNSD", "TND"):
        return f"the cache is {call.key}; layout {call.layout} takes (blocks, block_size, Nk * D)"
    if len(call.key) == 4 and call.packed and call.kv_heads == call.num_heads:
        return f"the cache is {call.key}; with N = Nk layout {call.layout} takes (blocks, block_size, Nk * D)"
    return None


def _decode_cache_limit(call: FiaCall) -> str | None:
    if not (call.paged and call.decode):
        return None
    count: Size = 1
    for size in call.key:
        count = count * size
    return f"the cache has {count} elements, too many for int32" if guard(count > MAX_DECODE_CACHE) else None


LENGTH_RULES: tuple[Rule[FiaCall], ...] = (
    Rule("batched_list_sizes", DOCS_V1, _batched_list_sizes, gate=True),
    Rule("batched_list_values", DOCS_V1, _batched_list_values),
    Rule("packed_lists_given", DOCS_V1, _packed_lists_given, gate=True),
    Rule("packed_ends", f"{DOCS_V1}; {TILING}", _packed_ends),
    Rule("paged_lengths", DOCS_V1, _paged_lengths),
    Rule("table", DOCS_V1, _table),
    Rule("block_size", f"{DOCS_V1}; {DOCS_V2}", _block_size),
    Rule("cache", f"{DOCS_V1}; {DOCS_V2}", _cache),
    Rule("decode_cache_limit", DOCS_V1, _decode_cache_limit),
)
