"""Limits of the fused infer attention operator: tensors, heads, sizes, features that exclude each other."""

from __future__ import annotations

import torch

from sgl_npu.runtime.npu.fia_call import FiaCall
from sgl_npu.runtime.npu.layouts import FIA_LAYOUTS
from sgl_npu.runtime.npu.rule import Rule
from sgl_npu.runtime.npu.sources import DOCS_V1, DOCS_V2, EMULATION, META, TILING, TILING_ONLY
from sgl_npu.runtime.sizes import Size, guard

MAX_BATCH = 65536
MAX_HEADS = 256
MAX_GROUP = 64
MAX_DIM = 512
DIM_MULTIPLE = 16
MAX_LENGTH = 20_971_520
MAX_DECODE_KEYS = 262_144
MAX_TOKENS = 1_048_576
# (query and key dim, value dim) of the packed layouts.
PACKED_DIMS = ((64, 64), (128, 128), (192, 128), (192, 192))
NBSD_ROWS = (2, 16)
SINK_MAX_VALUE_DIM = 128

FLOATS = (torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def outside(value: Size, allowed: tuple[int, ...]) -> bool:
    """Whether a size is seen to be none of `allowed`."""
    return all(guard(value != other) for other in allowed)


def shapes_differ(one: tuple[Size, ...], other: tuple[Size, ...]) -> bool:
    return len(one) != len(other) or any(guard(a != b) for a, b in zip(one, other, strict=True))


def _covered_inputs(call: FiaCall) -> str | None:
    if call.other_inputs:
        return f"{', '.join(sorted(call.other_inputs))} given: not covered by the emulation"
    return None


def _float_dtype(call: FiaCall) -> str | None:
    if call.query_dtype == torch.int8:
        return "query is int8; quantised calls are not covered by the emulation"
    if call.query_dtype not in FLOATS:
        return f"query is {dtype_name(call.query_dtype)}; the kernel takes float16 and bfloat16"
    return None


def _same_dtypes(call: FiaCall) -> str | None:
    for name, dtype in (("key", call.key_dtype), ("value", call.value_dtype)):
        if dtype != call.query_dtype:
            return f"{name} is {dtype_name(dtype)} but query is {dtype_name(call.query_dtype)}; they must agree"
    return None


def _contiguous(call: FiaCall) -> str | None:
    for name, contiguous in zip(("query", "key", "value"), call.contiguous or (), strict=False):
        if not contiguous:
            return f"{name} is not contiguous"
    return None


def _known_layout(call: FiaCall) -> str | None:
    if call.layout not in FIA_LAYOUTS:
        return f"layout {call.layout} is not one of {', '.join(FIA_LAYOUTS)}"
    return None


def _query_rank(call: FiaCall) -> str | None:
    if len(call.query) != len(call.axes):
        return f"query has {len(call.query)} axes; layout {call.layout} has {len(call.axes)}"
    return None


def _key_value_rank(call: FiaCall) -> str | None:
    for name, shape in (("key", call.key), ("value", call.value)):
        if call.paged and len(shape) == 5:
            return f"{name} has 5 axes; NZ caches are not covered by the emulation"
        if call.paged and len(shape) not in (3, 4):
            return f"{name} has {len(shape)} axes; a paged cache has 3, 4 or 5"
        if not call.paged and len(shape) != len(call.query):
            return f"{name} has {len(shape)} axes but query has {len(call.query)}; they must agree"
    return None


def _table_rank(call: FiaCall) -> str | None:
    if call.block_table is not None and len(call.block_table) != 2:
        return f"block_table has {len(call.block_table)} axes; it must be (B, blocks)"
    return None


def _positive_heads(call: FiaCall) -> str | None:
    if call.num_heads <= 0 or call.num_key_value_heads < 0:
        return f"N = {call.num_heads}, Nk = {call.num_key_value_heads}; head counts must be positive"
    return None


def _grouped_heads(call: FiaCall) -> str | None:
    heads, kv_heads = call.num_heads, call.kv_heads
    if heads > MAX_HEADS or kv_heads > MAX_HEADS:
        return f"N = {heads}, Nk = {kv_heads} exceed {MAX_HEADS}"
    if heads % kv_heads:
        return f"N = {heads} is not a multiple of Nk = {kv_heads}"
    if heads // kv_heads > MAX_GROUP:
        return f"N/Nk = {heads // kv_heads} exceeds {MAX_GROUP}"
    return None


def _head_axes(call: FiaCall) -> str | None:
    for name, axis, heads in (
        ("query", call.q.heads, call.num_heads),
        ("key", call.k.heads, call.kv_heads),
        ("value", call.v.heads, call.kv_heads),
    ):
        if guard(axis != heads):
            return f"{name} has {axis} heads but the call says {heads}"
    return None


def _divisible_hidden(call: FiaCall) -> str | None:
    flat = [("query", call.query, call.num_heads)] if "H" in call.axes else []
    if len(call.key) == 3 if call.paged else "H" in call.axes:
        flat += [("key", call.key, call.kv_heads), ("value", call.value, call.kv_heads)]
    for name, shape, heads in flat:
        if guard(shape[2] % heads != 0):
            return f"{name} has H = {shape[2]}, not a multiple of its {heads} heads"
    return None


def _key_fits_query(call: FiaCall) -> str | None:
    if guard(call.k.dim != call.q.dim):
        return f"key has D = {call.k.dim} but query has D = {call.q.dim}; they must agree"
    if not call.packed and not call.paged and guard(call.k.batch != call.q.batch):
        return f"key has B = {call.k.batch} but query has B = {call.q.batch}; they must agree"
    return None


def _value_fits_key(call: FiaCall) -> str | None:
    # Only the packed layouts may have another dim in value; the table of packed dims says which.
    if call.packed and not call.paged:
        differ = shapes_differ(call.key[:-1], call.value[:-1])
    else:
        differ = shapes_differ(call.key, call.value)
    return f"key is {call.key} but value is {call.value}; they must agree" if differ else None


def _batch_limit(call: FiaCall) -> str | None:
    return f"B = {call.batch} exceeds {MAX_BATCH}" if guard(call.batch > MAX_BATCH) else None


def _dim_limit(call: FiaCall) -> str | None:
    for name, dim in (("D", call.q.dim), ("Dv", call.v.dim)):
        if guard(dim < 1) or guard(dim > MAX_DIM):
            return f"{name} = {dim} is not in 1..{MAX_DIM}"
        if guard(dim % DIM_MULTIPLE != 0):
            return f"{name} = {dim} is not a multiple of {DIM_MULTIPLE}"
    return None


def _length_limit(call: FiaCall) -> str | None:
    if call.packed:
        names, limit = ("T1", "T2"), MAX_TOKENS
    else:
        names, limit = ("S1", "S2"), MAX_DECODE_KEYS if call.decode else MAX_LENGTH
    for name, length in zip(names, (call.q.length, call.k.length), strict=True):
        if guard(length > limit):
            return f"{name} = {length} exceeds {limit}"
    return None


def _packed_dims(call: FiaCall) -> str | None:
    if not call.packed:
        return None
    dims = (call.q.dim, call.v.dim)
    if guard(dims[0] == 512):
        return f"D = 512 in layout {call.layout} is MLA; not covered by the emulation"
    if all(shapes_differ(dims, allowed) for allowed in PACKED_DIMS):
        allowed = ", ".join(map(str, PACKED_DIMS))
        return f"(D, Dv) = {dims} in layout {call.layout}; the kernel takes {allowed}"
    return None


def _packed_wide_value(call: FiaCall) -> str | None:
    if not (call.packed and guard(call.v.dim == 192)):
        return None
    if call.kv_heads != call.num_heads:
        return f"Dv = 192 in layout {call.layout} needs N = Nk, seen {call.num_heads} and {call.kv_heads}"
    if call.layout == "NTD_TND" or call.paged:
        return f"Dv = 192 does not go with {'block_table' if call.paged else 'layout NTD_TND'}"
    return None


def _packed_dtype(call: FiaCall) -> str | None:
    if call.packed and call.query_dtype == torch.float16:
        return f"query is float16 in layout {call.layout}; the tiling takes bfloat16 only"
    return None


def _packed_precision(call: FiaCall) -> str | None:
    if call.packed and call.inner_precise != 0 and call.query_dtype == torch.bfloat16:
        return f"inner_precise = {call.inner_precise} with bfloat16 in layout {call.layout}; it must be 0"
    return None


def _inner_precise(call: FiaCall) -> str | None:
    highest = 1 if call.decode else 3
    if not 0 <= call.inner_precise <= highest:
        at = " at S1 = 1" if call.decode else ""
        return f"inner_precise = {call.inner_precise} is not in 0..{highest}{at}"
    return None


def _transposing_rows(call: FiaCall) -> str | None:
    if call.layout == "BNSD_BSND" and call.decode:
        return "layout BNSD_BSND at S1 = 1; it needs two rows or more"
    low, high = NBSD_ROWS
    if call.layout == "BNSD_NBSD" and (guard(call.q.length < low) or guard(call.q.length > high)):
        return f"S1 = {call.q.length} in layout BNSD_NBSD is not in {low}..{high}"
    return None


def _lse_dim(call: FiaCall) -> str | None:
    if call.softmax_lse_flag and guard(call.q.dim == 512):
        return "softmax_lse_flag with D = 512; the log-sum-exp is not given there"
    return None


def _sink(call: FiaCall) -> str | None:
    if call.learnable_sink is None:
        return None
    if call.version != 2:
        return "learnable_sink is an argument of version 2 only"
    if call.layout not in ("TND", "NTD_TND"):
        return f"learnable_sink in layout {call.layout}; it needs TND or NTD_TND"
    if call.learnable_sink_dtype != torch.bfloat16:
        return f"learnable_sink is {dtype_name(call.learnable_sink_dtype)}; it must be bfloat16"
    if shapes_differ(call.learnable_sink, (call.num_heads,)):
        return f"learnable_sink is {call.learnable_sink}; it must be (N,) = ({call.num_heads},)"
    if guard(call.v.dim > SINK_MAX_VALUE_DIM):
        return f"learnable_sink with Dv = {call.v.dim}, which exceeds {SINK_MAX_VALUE_DIM}"
    if call.pse_shift is not None:
        return "learnable_sink does not go with pse_shift"
    return None


def _sink_dims(call: FiaCall) -> str | None:
    if call.learnable_sink is not None and outside(call.q.dim, (64, 128)):
        return f"learnable_sink with D = {call.q.dim}; the tiling takes 64 and 128"
    return None


def _sink_lse(call: FiaCall) -> str | None:
    if call.learnable_sink is not None and call.softmax_lse_flag:
        return "softmax_lse_flag with learnable_sink: not covered by the emulation"
    return None


TENSOR_RULES: tuple[Rule[FiaCall], ...] = (
    Rule("covered_inputs", EMULATION, _covered_inputs),
    Rule("float_dtype", DOCS_V1, _float_dtype),
    Rule("same_dtypes", DOCS_V1, _same_dtypes),
    Rule("contiguous", DOCS_V1, _contiguous),
    Rule("known_layout", META, _known_layout, gate=True),
    Rule("positive_heads", META, _positive_heads, gate=True),
    Rule("query_rank", META, _query_rank, gate=True),
    Rule("key_value_rank", META, _key_value_rank, gate=True),
    Rule("table_rank", DOCS_V1, _table_rank, gate=True),
    Rule("grouped_heads", DOCS_V1, _grouped_heads),
    Rule("head_axes", DOCS_V1, _head_axes),
    Rule("divisible_hidden", DOCS_V1, _divisible_hidden),
    Rule("key_fits_query", DOCS_V1, _key_fits_query),
    Rule("value_fits_key", DOCS_V1, _value_fits_key),
    Rule("batch_limit", DOCS_V1, _batch_limit),
    Rule("dim_limit", f"{DOCS_V2}; {TILING}", _dim_limit),
    Rule("length_limit", f"{DOCS_V1}; {TILING}", _length_limit),
    Rule("packed_dims", f"{DOCS_V2}; {TILING}", _packed_dims),
    Rule("packed_wide_value", DOCS_V1, _packed_wide_value),
    Rule("packed_dtype", TILING_ONLY, _packed_dtype),
    Rule("packed_precision", DOCS_V2, _packed_precision),
    Rule("inner_precise", DOCS_V1, _inner_precise),
    Rule("transposing_rows", f"{DOCS_V1}; {TILING}", _transposing_rows),
    Rule("lse_dim", f"{DOCS_V1}; {TILING}", _lse_dim),
    Rule("sink", DOCS_V2, _sink),
    Rule("sink_dims", TILING_ONLY, _sink_dims),
    Rule("sink_lse", EMULATION, _sink_lse),
)
