"""CUDA: torch's own scaled_dot_product_attention, which picks flash, cuDNN or memory-efficient by its own rules."""

from __future__ import annotations

import torch.nn.functional as F

from sgl_npu.lowering.kernel import AttentionCall, Kernel, additive_mask, is_empty, open_band
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
    has_tensor = call.mask is not None or call.bias is not None
    if call.lower is not None or not (call.upper is None or (known(call.upper == 0) and not has_tensor)):
        return "a band other than top-left causal alone would become an S x S mask"
    return None


def _emit(call: AttentionCall):
    call = open_band(call)
    causal = call.upper is not None and call.mask is None and call.bias is None
    keep = None if causal else keep_mask(call.query, call.key, call.mask, call.lower, call.upper)
    out = F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=keep if call.bias is None else additive_mask(call, keep),
        is_causal=causal,
        scale=call.scale,
        enable_gqa=guard(call.query.size(1) != call.key.size(1)),
    )
    return out, None


SDPA = Kernel("sdpa", "aten.scaled_dot_product_attention", _refuse, _emit)
SDPA_MASKED = Kernel("sdpa_masked", "aten.scaled_dot_product_attention", _refuse_any, _emit)
