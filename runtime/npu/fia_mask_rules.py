"""Limits of the fused infer attention operator: mask, window and position bias.

The mask is True where a key is masked out. Modes 2, 3 and 4 (causal from the top left, causal from the bottom
right, band) always take one 2048 x 2048 mask whose strict upper triangle is True, whatever the lengths are.
"""

from __future__ import annotations

import torch

from sgl_npu.runtime.npu.fia_call import FiaCall, Shape
from sgl_npu.runtime.npu.fia_rules import FLOATS, dtype_name, outside, shapes_differ
from sgl_npu.runtime.npu.rule import Rule
from sgl_npu.runtime.npu.sources import DOCS_V1, DOCS_V2, EMULATION, TILING, TILING_ONLY
from sgl_npu.runtime.sizes import Size, guard

DENSE_MODES = (0, 1)
COMPRESSED_MODES = (2, 3, 4)
TREE_MODE = 9
PACKED_MODES = (0, 3, 4)
MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)
COMPRESSED_SIDE = 2048
COMPRESSED_SHAPES = tuple((1,) * extra + (COMPRESSED_SIDE, COMPRESSED_SIDE) for extra in range(3))


def _known_mode(call: FiaCall) -> str | None:
    if call.sparse_mode == TREE_MODE:
        return "sparse_mode = 9 (tree): not covered by the emulation"
    if call.sparse_mode not in DENSE_MODES + COMPRESSED_MODES:
        return f"sparse_mode = {call.sparse_mode} is not supported"
    return None


def _mask_dtype(call: FiaCall) -> str | None:
    if call.atten_mask is not None and call.atten_mask_dtype not in MASK_DTYPES:
        return f"atten_mask is {dtype_name(call.atten_mask_dtype)}; the kernel takes bool, int8 and uint8"
    return None


def _mask_given(call: FiaCall) -> str | None:
    if call.atten_mask is None and call.sparse_mode in (1, *COMPRESSED_MODES):
        return f"sparse_mode = {call.sparse_mode} needs an atten_mask"
    return None


def compressed_mask_sentence(mask: Shape | None, mode: int) -> str | None:
    """What is wrong with the shape of the mask of modes 2, 3 and 4, if anything."""
    if mode not in COMPRESSED_MODES or mask is None:
        return None
    if all(shapes_differ(mask, allowed) for allowed in COMPRESSED_SHAPES):
        return f"atten_mask is {mask}; sparse_mode = {mode} takes a {COMPRESSED_SIDE} x {COMPRESSED_SIDE} mask"
    return None


def _compressed_mask(call: FiaCall) -> str | None:
    return compressed_mask_sentence(call.atten_mask, call.sparse_mode)


def _decode_compressed_mask(call: FiaCall) -> str | None:
    mask = call.atten_mask
    if call.decode and call.sparse_mode in (3, 4) and mask is not None and len(mask) != 2:
        return f"atten_mask is {mask}; at S1 = 1 sparse_mode = {call.sparse_mode} takes (2048, 2048)"
    return None


def _dense_mask_rank(call: FiaCall) -> str | None:
    mask = call.atten_mask
    if mask is not None and call.sparse_mode in DENSE_MODES and len(mask) not in (2, 3, 4):
        return f"atten_mask has {len(mask)} axes; a dense mask has 2, 3 or 4"
    return None


def _dense_mask_heads(call: FiaCall) -> str | None:
    mask = call.atten_mask
    if mask is not None and call.sparse_mode in DENSE_MODES and len(mask) == 4 and guard(mask[1] != 1):
        return f"atten_mask has a head axis of {mask[1]}; per-head masks are not supported"
    return None


def _dense_mask_batch(call: FiaCall) -> str | None:
    mask = call.atten_mask
    if mask is None or call.decode or call.sparse_mode not in DENSE_MODES or len(mask) not in (3, 4):
        return None
    if guard(mask[0] != call.batch) and guard(mask[0] != 1):
        return f"atten_mask has a batch axis of {mask[0]}; it must be 1 or B = {call.batch}"
    return None


def _decode_mask_batch(call: FiaCall) -> str | None:
    # Mode 2 goes the same way as the dense modes here, so its 2048 x 2048 mask passes only where B is 2048.
    mask = call.atten_mask
    if mask is not None and call.decode and call.sparse_mode in (0, 1, 2) and guard(mask[0] != call.batch):
        return f"atten_mask has a first axis of {mask[0]}; at S1 = 1 it must be B = {call.batch}"
    return None


def _dense_mask_rows(call: FiaCall) -> str | None:
    mask = call.atten_mask
    if mask is None or call.packed or call.decode or call.sparse_mode not in DENSE_MODES:
        return None
    if guard(mask[-2] < call.q.length):
        return f"atten_mask has {mask[-2]} rows; S1 = {call.q.length} needs as many"
    return None


def _dense_mask_columns(call: FiaCall) -> str | None:
    mask = call.atten_mask
    if mask is None or call.packed or call.sparse_mode not in DENSE_MODES:
        return None
    # With one row only the longest sequence counts, otherwise the whole axis does.
    longest = call.decode and not call.paged and call.actual_seq_lengths_kv is not None
    needed: list[Size] = [keys for _, keys in call.lengths] if longest else [call.k.length]
    for keys in needed:
        if guard(mask[-1] < keys):
            return f"atten_mask has {mask[-1]} columns; {keys} keys need as many"
    return None


def _packed_mode(call: FiaCall) -> str | None:
    if not call.packed:
        return None
    if call.sparse_mode not in PACKED_MODES:
        return f"sparse_mode = {call.sparse_mode} in layout {call.layout}; it takes 0, 3 and 4"
    if call.sparse_mode == 0 and call.atten_mask is not None:
        return f"atten_mask with sparse_mode = 0 in layout {call.layout}; it takes no dense mask"
    if call.sparse_mode == 4 and outside(call.v.dim, (64, 128)):
        return f"Dv = {call.v.dim} with sparse_mode = 4 in layout {call.layout}; it takes 64 and 128"
    return None


def _packed_causal_lengths(call: FiaCall) -> str | None:
    if call.packed and call.sparse_mode == 3:
        for rows, keys in call.lengths:
            if guard(rows > keys):
                return f"{rows} query rows but {keys} keys with sparse_mode = 3 in layout {call.layout}"
    return None


def _uses_window(call: FiaCall) -> bool:
    return call.sparse_mode == 4 or (call.sparse_mode == 0 and call.atten_mask is not None)


def _window_signs(call: FiaCall) -> str | None:
    before, after = call.pre_tokens, call.next_tokens
    if not _uses_window(call):
        return None
    if (before < 0 and after < 0) or -after > before:
        return f"pre_tokens = {before}, next_tokens = {after}: the window is empty"
    for rows, keys in call.lengths:
        reach_after, reach_before = (keys, rows) if call.sparse_mode == 4 else (rows, keys)
        if after < 0 and guard(-after >= reach_after):
            return f"next_tokens = {after} is beyond the length {reach_after}"
        if before < 0 and guard(-before >= reach_before):
            return f"pre_tokens = {before} is beyond the length {reach_before}"
    return None


def _decode_window(call: FiaCall) -> str | None:
    # The kernel takes such a call and drops the window without a word.
    if not (call.decode and _uses_window(call)):
        return None
    for _, keys in call.lengths:
        before = call.pre_tokens - (keys - 1 if call.sparse_mode == 4 else 0)
        after = call.next_tokens - (0 if call.sparse_mode == 4 else keys - 1)
        if guard(keys > 0) and (guard(before < 0) or guard(after < 0)):
            window = f"pre_tokens = {call.pre_tokens}, next_tokens = {call.next_tokens}"
            return f"{window} cut into {keys} keys; at S1 = 1 the window has no effect"
    return None


def _pse_dtype(call: FiaCall) -> str | None:
    if call.pse_shift is None:
        return None
    if call.pse_shift_dtype not in FLOATS or call.pse_shift_dtype != call.query_dtype:
        seen, query = dtype_name(call.pse_shift_dtype), dtype_name(call.query_dtype)
        return f"pse_shift is {seen} but query is {query}; they must agree"
    return None


def _pse_shape(call: FiaCall) -> str | None:
    pse = call.pse_shift
    if pse is None:
        return None
    if call.packed:
        return f"pse_shift does not go with layout {call.layout}"
    needed = f"(1 or B, N, >= S1, >= S2) with B = {call.batch}, N = {call.num_heads}"
    wrong = (
        len(pse) != 4
        or (guard(pse[0] != call.batch) and guard(pse[0] != 1))
        or guard(pse[1] != call.num_heads)
        or guard(pse[2] < call.q.length)
        or guard(pse[3] < call.k.length)
    )
    return f"pse_shift is {pse}; it must be {needed}, {call.q.length}, {call.k.length}" if wrong else None


MASK_RULES: tuple[Rule[FiaCall], ...] = (
    Rule("known_mode", f"{DOCS_V1}; {DOCS_V2}; {EMULATION}", _known_mode),
    Rule("mask_dtype", DOCS_V1, _mask_dtype),
    Rule("mask_given", f"{DOCS_V2}; {TILING}", _mask_given),
    Rule("compressed_mask", f"{DOCS_V2}; {TILING}", _compressed_mask, gate=True),
    Rule("decode_compressed_mask", TILING_ONLY, _decode_compressed_mask),
    Rule("dense_mask_rank", DOCS_V1, _dense_mask_rank, gate=True),
    Rule("dense_mask_heads", DOCS_V1, _dense_mask_heads),
    Rule("dense_mask_batch", f"{DOCS_V1}; {TILING}", _dense_mask_batch),
    Rule("decode_mask_batch", f"{DOCS_V1}; {TILING}", _decode_mask_batch),
    Rule("dense_mask_rows", f"{DOCS_V1}; {TILING}", _dense_mask_rows),
    Rule("dense_mask_columns", f"{DOCS_V1}; {TILING}", _dense_mask_columns),
    Rule("packed_mode", TILING_ONLY, _packed_mode),
    Rule("packed_causal_lengths", TILING_ONLY, _packed_causal_lengths),
    Rule("window_signs", TILING, _window_signs),
    Rule("decode_window", DOCS_V1, _decode_window),
    Rule("pse_dtype", DOCS_V1, _pse_dtype),
    Rule("pse_shape", DOCS_V1, _pse_shape),
)
