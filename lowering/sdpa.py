"""CUDA: torch's own scaled_dot_product_attention, which picks flash, cuDNN or memory-efficient by its own rules.

Rows that a mask leaves no key come out of cuDNN as something else than 0 (seen in torch 2.11).
"""

from __future__ import annotations

import torch.nn.functional as F

from sgl_npu.lowering.empty_rows import has_no_key, may_have_no_key
from sgl_npu.lowering.kernel import AttentionCall, Kernel, additive_mask, four_dims, is_empty, open_band
from sgl_npu.runtime.attention import keep_mask
from sgl_npu.runtime.sizes import guard, known


def _refuse_any(call: AttentionCall) -> str | None:
    if call.softcap > 0.0:
        return f"softcap = {call.softcap}: scaled_dot_product_attention has no softcap"
    if call.sinks is not None or call.needs_lse:
        return "sinks or a used lse: scaled_dot_product_attention returns no lse"
    if is_empty(call):
        return "an empty batch, query or key"
    if call.bias is not None and call.bias.dtype != call.query.dtype:
        return f"bias is {call.bias.dtype} but query is {call.query.dtype}: its CUDA kernels take one dtype"
    return None


def _refuse(call: AttentionCall) -> str | None:
    reason = _refuse_any(call)
    if reason is not None:
        return reason
    call = open_band(call)
    if call.lower is not None or not (call.upper is None or _is_causal(call)):
        return "a band other than top-left causal alone would become an S x S mask"
    return None


def _is_causal(call: AttentionCall) -> bool:
    """Whether the flag `is_causal` says all that is masked."""
    alone = call.lower is None and call.mask is None and call.bias is None
    return alone and call.upper is not None and known(call.upper == 0)


def _emit(call: AttentionCall):
    call = open_band(call)
    causal = _is_causal(call)
    mask = None if causal else keep_mask(call.query, call.key, call.mask, call.lower, call.upper)
    if call.bias is not None:
        mask = additive_mask(call, mask)
    out = F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=None if mask is None else four_dims(mask),
        is_causal=causal,
        scale=call.scale,
        enable_gqa=guard(call.query.size(1) != call.key.size(1)),
    )
    if not causal and may_have_no_key(call):
        out = out.masked_fill(has_no_key(call).unsqueeze(-1), 0.0)
    return out, None


SDPA = Kernel("sdpa", "aten.scaled_dot_product_attention", _refuse, _emit)
SDPA_MASKED = Kernel("sdpa_masked", "aten.scaled_dot_product_attention", _refuse_any, _emit)
