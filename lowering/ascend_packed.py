"""NPU: packed and paged attention as npu_fused_infer_attention_score (FIA) in layout TND with lists of lengths.

    queries (T, N, D) with cumulative ends; keys (Tk, Nk, D) with cumulative ends, or blocks (N, P, Nk * D) read through
    block_table with the number of keys of each sequence; the lists go to the op as they came: no arithmetic on them

    attends to everything   sparse_mode 0, no mask      S1 rows and S2 keys of a sequence:
    causal                  sparse_mode 3               3  j <= i + S2 - S1
    window                  sparse_mode 4               4  i + S2 - S1 - pre <= j <= i + S2 - S1 + next

Rows: TND; TND of version 2 with sinks; TND with the head size padded; BSND where all sequences have as many queries,
which takes float16 and head sizes that TND does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.ascend_mask import INT_MAX, triangle
from sgl_npu.lowering.packed import PackedCall, PackedKernel
from sgl_npu.runtime.npu import ensure_ops
from sgl_npu.runtime.npu.fia_length_rules import MAX_SEQUENCES
from sgl_npu.runtime.npu.fia_rules import PACKED_DIMS
from sgl_npu.runtime.npu.rules import FiaCall, first_violation
from sgl_npu.runtime.sizes import guard, known, specialise


def _mode(call: PackedCall) -> dict[str, Any]:
    """sparse_mode and, for a window, its two sides."""
    if call.before is None and call.after is None:
        return {}
    if call.before is None and call.after == 0:
        return {"sparse_mode": 3}
    sides = {"pre_tokens": call.before, "next_tokens": call.after}
    return {"sparse_mode": 4, **{name: INT_MAX if side is None else side for name, side in sides.items()}}


def _mask(call: PackedCall, mode: dict[str, Any]) -> Tensor | None:
    return triangle(call.query.device) if mode else None


def _keys(call: PackedCall) -> tuple[Tensor, Tensor]:
    """A cache (N, P, Nk, D) as (N, P, Nk * D), the form that every layout takes."""
    if call.paged:
        return call.key.flatten(2), call.value.flatten(2)
    return call.key.contiguous(), call.value.contiguous()


def _paging(call: PackedCall) -> dict[str, Any]:
    return {"block_table": call.block_table, "block_size": specialise(call.key.size(1))} if call.paged else {}


def _refuse_any(call: PackedCall) -> str | None:
    if call.softcap > 0.0:
        return f"softcap = {call.softcap}: the kernel has no softcap"
    if guard(call.query.size(0) == 0):
        return "no query"
    if call.paged and not (call.key.is_contiguous() and call.value.is_contiguous()):
        return f"the cache has strides {call.key.stride()}: making it contiguous would copy it at every call"
    for rows, keys in call.lengths:
        if guard(keys == 0) and not guard(rows == 0):
            return f"a sequence has {rows} queries and no key; what the kernel gives for it is not documented"
        if call.after is not None and guard(rows > keys):
            return f"{rows} query rows but {keys} keys: its first rows attend to nothing"
    return None


# ---------------------------------------------------------------- TND


def _refuse_packed(call: PackedCall) -> str | None:
    if call.sinks is not None:
        return "sinks: version 1 of the kernel has none"
    return _refuse_tnd(call)


def _refuse_tnd(call: PackedCall) -> str | None:
    reason = _refuse_any(call)
    if reason is not None:
        return reason
    mode = _mode(call)
    heads, kv_heads = call.head_counts()
    key, value = _keys(call)
    return first_violation(
        FiaCall.of(
            call.query.contiguous(),
            key,
            value,
            atten_mask=_mask(call, mode),
            learnable_sink=call.sinks,
            version=1 if call.sinks is None else 2,
            layout="TND",
            num_heads=heads,
            num_key_value_heads=kv_heads,
            softmax_lse_flag=call.needs_lse,
            actual_seq_lengths=call.ends,
            actual_seq_lengths_kv=call.kv_lengths,
            **_paging(call),
            **mode,
        )
    )


def _emit_packed(call: PackedCall) -> tuple[Tensor, Tensor | None]:
    ensure_ops()
    mode = _mode(call)
    heads, kv_heads = call.head_counts()
    given = {
        "atten_mask": _mask(call, mode),
        "actual_seq_lengths": call.ends,
        "actual_seq_lengths_kv": call.kv_lengths,
        **_paging(call),
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": call.scale,
        "input_layout": "TND",
        **mode,
        **({"softmax_lse_flag": True} if call.needs_lse else {}),
    }
    out, lse = torch.ops.npu.npu_fused_infer_attention_score.default(
        call.query.contiguous(), *_keys(call), **{name: x for name, x in given.items() if x is not None}
    )
    return out, lse.squeeze(-1) if call.needs_lse else None


def _has_sinks(call: PackedCall) -> bool:
    return call.sinks is not None


def _refuse_sink(call: PackedCall) -> str | None:
    if call.needs_lse:
        return "the lse is used; whether the kernel's lse counts the sink is not documented"
    return _refuse_tnd(call)


def _emit_sink(call: PackedCall) -> tuple[Tensor, None]:
    ensure_ops()
    mode = _mode(call)
    heads, kv_heads = call.head_counts()
    given = {
        "atten_mask": _mask(call, mode),
        "actual_seq_qlen": call.ends,
        "actual_seq_kvlen": call.kv_lengths,
        **_paging(call),
        "learnable_sink": call.sinks,
        "num_query_heads": heads,
        "num_key_value_heads": kv_heads,
        "softmax_scale": call.scale,
        "input_layout": "TND",
        **mode,
    }
    out, _ = torch.ops.npu.npu_fused_infer_attention_score_v2.default(
        call.query.contiguous(), *_keys(call), **{name: x for name, x in given.items() if x is not None}
    )
    return out, None


# ---------------------------------------------------------------- TND takes few head sizes


def _padded_size(call: PackedCall) -> int | None:
    """The smallest head size of TND that holds this one, for keys and values alike; None where there is none."""
    wanted = max(specialise(call.query.size(-1)), specialise(call.value.size(-1)))
    return min((dim for dim, value_dim in PACKED_DIMS if dim == value_dim and dim >= wanted), default=None)


def _pad(call: PackedCall, size: int) -> PackedCall:
    """Zeros appended to D and Dv change no score and no kept output."""
    query, key, value = (
        x if guard(x.size(-1) == size) else F.pad(x, (0, size - x.size(-1))) for x in (call.query, call.key, call.value)
    )
    return replace(call, query=query, key=key, value=value)


def _is_odd_size(call: PackedCall) -> bool:
    sizes = call.query.size(-1), call.value.size(-1)
    return not any(known(sizes[0] == dim) and known(sizes[1] == value_dim) for dim, value_dim in PACKED_DIMS)


def _refuse_padded(call: PackedCall) -> str | None:
    size = _padded_size(call)
    if size is None:
        return f"D = {call.query.size(-1)} is larger than every head size of layout TND"
    if call.paged:
        return f"D = {call.query.size(-1)}: padding it would copy the whole cache at every call"
    if call.sinks is not None:
        return "sinks: version 1 of the kernel has none"
    return _refuse_tnd(_pad(call, size))


def _emit_padded(call: PackedCall) -> tuple[Tensor, Tensor | None]:
    size = _padded_size(call)
    assert size is not None
    out, lse = _emit_packed(_pad(call, size))
    return out[..., : call.value.size(-1)], lse


# ---------------------------------------------------------------- BSND, where all sequences have as many queries


def _is_uniform_paged(call: PackedCall) -> bool:
    """Asked of calls that TND does not take: a guard, so that a mixture of lengths gets a graph of its own."""
    rows = call.ends[0]
    return call.paged and all(guard(end == (i + 1) * rows) for i, end in enumerate(call.ends))


def _batched(call: PackedCall) -> tuple[Tensor, dict[str, Any]]:
    """The queries as (B, S, N, D) and the mode. With one query each, causal attends to every key there is."""
    query = call.query.contiguous().unflatten(0, (len(call.ends), -1))
    mode = _mode(call)
    return query, {} if guard(query.size(1) == 1) and mode == {"sparse_mode": 3} else mode


def _refuse_batched(call: PackedCall) -> str | None:
    if call.sinks is not None:
        return "sinks need layout TND"
    reason = _refuse_any(call)
    if reason is not None:
        return reason
    query, mode = _batched(call)
    if mode and guard(query.size(1) == 1):
        return "a window at S1 = 1, where it has no effect in layout BSND"
    heads, kv_heads = call.head_counts()
    key, value = _keys(call)
    return first_violation(
        FiaCall.of(
            query,
            key,
            value,
            atten_mask=_mask(call, mode),
            layout="BSND",
            num_heads=heads,
            num_key_value_heads=kv_heads,
            softmax_lse_flag=call.needs_lse,
            actual_seq_lengths_kv=call.kv_lengths,
            **_paging(call),
            **mode,
        )
    )


def _emit_batched(call: PackedCall) -> tuple[Tensor, Tensor | None]:
    ensure_ops()
    query, mode = _batched(call)
    heads, kv_heads = call.head_counts()
    given = {
        "atten_mask": _mask(call, mode),
        "actual_seq_lengths_kv": call.kv_lengths,
        **_paging(call),
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": call.scale,
        "input_layout": "BSND",
        **mode,
        **({"softmax_lse_flag": True} if call.needs_lse else {}),
    }
    out, lse = torch.ops.npu.npu_fused_infer_attention_score.default(
        query, *_keys(call), **{name: x for name, x in given.items() if x is not None}
    )
    return out.flatten(0, 1), lse.squeeze(-1).transpose(1, 2).flatten(0, 1) if call.needs_lse else None


_OP = "npu.npu_fused_infer_attention_score"
ASCEND_PACKED = PackedKernel("ascend_packed", _OP, _refuse_packed, _emit_packed)
ASCEND_PACKED_SINK = PackedKernel("ascend_packed_sink", f"{_OP}_v2", _refuse_sink, _emit_sink, _has_sinks)
ASCEND_PACKED_PADDED = PackedKernel("ascend_packed_padded", _OP, _refuse_padded, _emit_padded, _is_odd_size)
ASCEND_PAGED_BATCHED = PackedKernel("ascend_paged_batched", _OP, _refuse_batched, _emit_batched, _is_uniform_paged)


def takes_packed(call: PackedCall, sequences: int) -> bool:
    """Whether TND takes so many sequences of such tensors, whatever their lengths. `call` has them as one."""
    rows = (ASCEND_PACKED, ASCEND_PACKED_SINK, ASCEND_PACKED_PADDED)
    return sequences <= MAX_SEQUENCES and any(row.applies(call) and row.refuse(call) is None for row in rows)
