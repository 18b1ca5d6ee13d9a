"""NPU: npu_fused_infer_attention_score (FIA), the fused attention of inference on Ascend.

The limits are the table in `sgl_npu.runtime.npu.rules`; a row here builds the very call it would emit and asks that
table. Rows: the plain kernel; version 2 with learnable sinks; sinks through the lse; head sizes padded to 16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.ascend_layout import from_layout, full_layout, input_layout, to_layout
from sgl_npu.lowering.ascend_mask import AscendMask, ascend_mask
from sgl_npu.lowering.kernel import AttentionCall, Kernel, head_counts, is_empty, with_sinks
from sgl_npu.runtime.npu import ensure_ops
from sgl_npu.runtime.npu.rules import FiaCall, first_violation
from sgl_npu.runtime.sizes import guard, known, specialise

_ROW_FIX = 2  # inner_precise: rows left without a key give 0 instead of garbage; not available with one query row
_ALIGNMENT = 16


@dataclass(frozen=True)
class _Plan:
    """The op call that implements an attention: its tensors, its settings, how to read its result."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: AscendMask
    layout: str
    settings: dict[str, Any]


def _plan(call: AttentionCall) -> _Plan:
    layout = input_layout(call)
    mask = ascend_mask(call)
    decode = guard(call.query.size(2) == 1)
    heads, kv_heads = head_counts(call)
    settings: dict[str, Any] = {
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": call.scale,
        "input_layout": full_layout(call, layout),
        "sparse_mode": mask.sparse_mode,
        "pre_tokens": mask.pre_tokens,
        "next_tokens": mask.next_tokens,
        "inner_precise": _ROW_FIX if mask.empty_rows and not decode else 0,
        "softmax_lse_flag": call.needs_lse,
    }
    query, key, value = (to_layout(x, layout) for x in (call.query, call.key, call.value))
    return _Plan(query, key, value, mask, settings["input_layout"], settings)


def _refuse_any(call: AttentionCall) -> str | None:
    if call.softcap > 0.0:
        return f"softcap = {call.softcap}: the kernel has no softcap"
    if is_empty(call):
        return "an empty batch, query or key"
    return None


def _refuse(call: AttentionCall) -> str | None:
    if call.sinks is not None:
        return "sinks: version 1 of the kernel has none"
    return _refuse_without_sinks(call)


def _refuse_without_sinks(call: AttentionCall) -> str | None:
    reason = _refuse_any(call)
    if reason is not None:
        return reason
    plan = _plan(replace(call, sinks=None))
    settings = dict(plan.settings)
    return first_violation(
        FiaCall.of(
            plan.query,
            plan.key,
            plan.value,
            atten_mask=plan.mask.atten_mask,
            pse_shift=plan.mask.pse_shift,
            layout=settings.pop("input_layout"),
            **{name: x for name, x in settings.items() if name != "scale"},
        )
    )


def _emit(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    ensure_ops()
    plan = _plan(call)
    given = {"atten_mask": plan.mask.atten_mask, "pse_shift": plan.mask.pse_shift, **plan.settings}
    out, lse = torch.ops.npu.npu_fused_infer_attention_score.default(
        plan.query, plan.key, plan.value, **{name: x for name, x in given.items() if x != _DEFAULTS.get(name)}
    )
    return _finish(call, plan.mask, from_layout(out, plan.layout), lse.squeeze(-1) if call.needs_lse else None)


# Schema defaults, left out of the graph.
_DEFAULTS = {
    "atten_mask": None,
    "pse_shift": None,
    "sparse_mode": 0,
    "pre_tokens": 2147483647,
    "next_tokens": 2147483647,
    "inner_precise": 0,
    "softmax_lse_flag": False,
}


def _finish(call: AttentionCall, mask: AscendMask, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Empty rows as the canonical op has them: out 0 (one query row has no fix of its own), lse -inf, not +inf."""
    empty = _empty_decode_row(call, mask)
    if empty is not None:
        out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    if lse is not None:
        lse = lse.masked_fill(lse == float("inf"), float("-inf"))
        if empty is not None:
            lse = lse.masked_fill(empty, float("-inf"))
    return out, lse


def _empty_decode_row(call: AttentionCall, mask: AscendMask) -> Tensor | None:
    """Bool, broadcastable to (B, Hq, 1): the single query row keeps no key; None where that cannot happen."""
    if not mask.empty_rows or not guard(call.query.size(2) == 1):
        return None
    removed = mask.atten_mask
    if mask.pse_shift is not None:
        shifted = mask.pse_shift == float("-inf")
        removed = shifted if removed is None else removed | shifted
    return None if removed is None else removed.all(-1)


# ---------------------------------------------------------------- head sizes that are not a multiple of 16


def _padded_size(call: AttentionCall) -> int:
    """As a number: GE pads by no symbol, and a head size is the model's."""
    size = max(specialise(call.query.size(3)), specialise(call.value.size(3)))
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _pad(call: AttentionCall) -> AttentionCall:
    """Zeros appended to D and Dv change no score and no kept output."""
    size = _padded_size(call)
    query, key, value = (
        x if guard(x.size(3) == size) else F.pad(x, (0, size - x.size(3))) for x in (call.query, call.key, call.value)
    )
    return replace(call, query=query, key=key, value=value)


def _needs_padding(call: AttentionCall) -> bool:
    size = _padded_size(call)
    return not (known(call.query.size(3) == size) and known(call.value.size(3) == size))


def _refuse_padded(call: AttentionCall) -> str | None:
    return _refuse_without_sinks(_pad(call))


def _emit_padded(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    out, lse = _emit(_pad(call))
    return out[..., : call.value.size(3)], lse


# ---------------------------------------------------------------- learnable sinks


def _sink_call(call: AttentionCall) -> tuple[tuple[Tensor, ...], AscendMask, dict[str, Any]]:
    """Version 2 in the packed layout TND, the only one that takes sinks: sequences end to end, lengths cumulative."""
    mask = ascend_mask(call)
    if known(call.query.size(2) == call.key.size(2)) and mask.sparse_mode == 2:
        mask = replace(mask, sparse_mode=3)  # TND has no mode 2; with as many keys as rows mode 3 is the same
    tensors = tuple(to_layout(x, "BSND").flatten(0, 1) for x in (call.query, call.key, call.value))
    batch = specialise(call.query.size(0))  # as many lengths are listed
    heads, kv_heads = head_counts(call)
    settings: dict[str, Any] = {
        "num_query_heads": heads,
        "num_key_value_heads": kv_heads,
        "actual_seq_qlen": [(i + 1) * call.query.size(2) for i in range(batch)],
        "actual_seq_kvlen": [(i + 1) * call.key.size(2) for i in range(batch)],
        "softmax_scale": call.scale,
        "input_layout": "TND",
        "sparse_mode": mask.sparse_mode,
        "pre_tokens": mask.pre_tokens,
        "next_tokens": mask.next_tokens,
    }
    return tensors, mask, settings


def _refuse_sink(call: AttentionCall) -> str | None:
    reason = _refuse_any(call)
    if reason is not None:
        return reason
    if call.needs_lse:
        return "the lse is used; whether the kernel's lse counts the sink is not documented"
    tensors, mask, settings = _sink_call(call)
    if mask.empty_rows:
        return "rows may be left without a key; what the kernel gives for them beside a sink is not documented"
    return first_violation(
        FiaCall.of(
            *tensors,
            atten_mask=mask.atten_mask,
            pse_shift=mask.pse_shift,
            learnable_sink=call.sinks,
            version=2,
            layout="TND",
            num_heads=settings["num_query_heads"],
            num_key_value_heads=settings["num_key_value_heads"],
            actual_seq_lengths=settings["actual_seq_qlen"],
            actual_seq_lengths_kv=settings["actual_seq_kvlen"],
            **{name: settings[name] for name in ("sparse_mode", "pre_tokens", "next_tokens")},
        )
    )


def _emit_sink(call: AttentionCall) -> tuple[Tensor, None]:
    ensure_ops()
    tensors, mask, settings = _sink_call(call)
    given = {"atten_mask": mask.atten_mask, "learnable_sink": call.sinks, **settings}
    out, _ = torch.ops.npu.npu_fused_infer_attention_score_v2.default(
        *tensors, **{name: x for name, x in given.items() if name not in _DEFAULTS or x != _DEFAULTS[name]}
    )
    return out.unflatten(0, (call.query.size(0), call.query.size(2))).transpose(1, 2), None


def _has_sinks(call: AttentionCall) -> bool:
    return call.sinks is not None


def _refuse_lse_sink(call: AttentionCall) -> str | None:
    return _refuse_without_sinks(replace(call, needs_lse=True))


_OP = "npu.npu_fused_infer_attention_score"
ASCEND_FA = Kernel("ascend_fa", _OP, _refuse, _emit)
ASCEND_FA_SINK = Kernel("ascend_fa_sink", f"{_OP}_v2", _refuse_sink, _emit_sink, _has_sinks)
ASCEND_FA_LSE_SINK = Kernel("ascend_fa_lse_sink", _OP, _refuse_lse_sink, with_sinks(_emit), _has_sinks)
ASCEND_FA_PADDED = Kernel("ascend_fa_padded", _OP, _refuse_padded, with_sinks(_emit_padded), _needs_padding)
