"""CPU: aten's fused CPU attention, forward and backward.

The kernel takes a top-left causal flag and an additive mask, together if need be, handles GQA itself, and writes `out`
in the dimension order of the query. Measured on torch 2.13: its lse is 0.0 for rows whose mask excludes every key (we
write -inf), and it crashes on an empty query or key (we refuse those).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.empty_rows import has_no_key, may_have_no_key
from sgl_npu.lowering.kernel import (
    AttentionCall,
    BackwardCall,
    BackwardKernel,
    Kernel,
    additive_mask,
    is_empty,
    open_band,
    with_sinks,
)
from sgl_npu.runtime.attention import keep_mask
from sgl_npu.runtime.sizes import guard, known

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _refuse_any(call: AttentionCall) -> str | None:
    """Limits that hold whatever the band is."""
    if call.softcap > 0.0:
        return f"softcap = {call.softcap}: the kernel has no softcap"
    if is_empty(call):
        return "an empty batch, query or key: the kernel needs at least one of each"
    return None


def _is_top_left(call: AttentionCall) -> bool:
    call = open_band(call)
    return call.lower is None and (call.upper is None or known(call.upper == 0))


def _refuse(call: AttentionCall) -> str | None:
    reason = _refuse_any(call)
    if reason is None and not _is_top_left(call):
        reason = "the kernel knows no band other than top-left causal"
    return reason or (_refuse_causal_scale(call) if open_band(call).upper is not None else None)


def _refuse_causal_scale(call: AttentionCall) -> str | None:
    """The kernel writes -inf above the diagonal before it multiplies by the scale."""
    if call.scale > 0.0:
        return None
    return f"scale = {call.scale}: the kernel's causal mask is right for positive scales alone"


def _flash(call: AttentionCall, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kernel takes one head size: the smaller of D and Dv is filled up with zeros, which add nothing to a sum."""
    size, value_size = call.query.size(3), call.value.size(3)
    query, key, value = (_dense_rows(x) for x in (call.query, call.key, call.value))
    if guard(size > value_size):
        value = F.pad(value, (0, size - value_size))
    elif guard(size < value_size):
        query, key = (F.pad(x, (0, value_size - size)) for x in (query, key))
    out, lse = _FLASH(query, key, value, 0.0, causal, attn_mask=mask, scale=call.scale)
    return (out[..., :value_size] if guard(size > value_size) else out), lse


def _dense_rows(x: Tensor) -> Tensor:
    """`x` with the head dimension contiguous: the kernel reads rows of memory and never asks for that stride."""
    return x if guard(x.stride(-1) == 1) else x.contiguous()


def _finish(call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor | None]:
    if not call.needs_lse:
        return out, None
    return out, lse.masked_fill(has_no_key(call), float("-inf")) if may_have_no_key(call) else lse


def _emit(call: AttentionCall):
    call = open_band(call)
    out, lse = _flash(call, call.upper is not None, additive_mask(call, call.mask))
    return _finish(call, out, lse)


def _refuse_bottom_right(call: AttentionCall) -> str | None:
    reason = _refuse_any(call)
    if reason is not None:
        return reason
    call = open_band(call)
    if call.lower is not None or call.upper is None:
        return "a window, or no band: only an upper side alone splits into prefix and causal tail"
    if call.mask is not None or call.bias is not None:
        return "a mask tensor is left beside the band; one call with a combined mask serves it"
    if not guard(call.upper > 0) or not guard(call.upper < call.key.size(2)):
        return f"upper = {call.upper} leaves no prefix or no tail"
    return _refuse_causal_scale(call)


def _is_causal_beyond_the_diagonal(call: AttentionCall) -> bool:
    call = open_band(call)
    return call.lower is None and call.upper is not None and not known(call.upper == 0)


def _emit_bottom_right(call: AttentionCall):
    """Every query sees the keys before `upper`, and the others top-left causally: two calls merged by lse, no mask."""
    parts = []
    for keys, causal in ((slice(None, call.upper), False), (slice(call.upper, None), True)):
        part = AttentionCall(call.query, call.key[:, :, keys], call.value[:, :, keys], scale=call.scale)
        parts.append(_flash(part, causal, None))
    (prefix, prefix_lse), (tail, tail_lse) = parts
    share = torch.sigmoid(tail_lse - prefix_lse).unsqueeze(-1)
    out = (prefix + share * (tail.to(share.dtype) - prefix)).to(prefix.dtype)
    lse = None
    if call.needs_lse:
        lse = torch.logaddexp(prefix_lse, tail_lse)
    return out, lse


def _emit_masked(call: AttentionCall):
    keep = keep_mask(call.query, call.key, call.mask, call.lower, call.upper)
    out, lse = _flash(call, False, additive_mask(call, keep))
    return _finish(call, out, lse)


def _refuse_backward(call: BackwardCall) -> str | None:
    if call.grad_out is None or call.grad_lse is not None:
        return "a gradient flows through lse; the kernel differentiates out alone"
    size, value_size = call.forward.query.size(3), call.forward.value.size(3)
    if not guard(size == value_size):
        return f"D = {size} and Dv = {value_size} differ; the kernel needs them equal"
    if call.bias_grad or call.forward.sinks is not None:
        return "a gradient of bias or sinks; the kernel gives those of query, key and value"
    return _refuse(call.forward)


def _emit_backward(call: BackwardCall):
    forward = open_band(call.forward)
    lse = call.lse
    if forward.mask is not None or forward.bias is not None:
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # exp(-inf - -inf) would be NaN inside the kernel
    tensors = (call.grad_out, forward.query, forward.key, forward.value, call.out)
    grads = _FLASH_BACKWARD(
        *(_dense_rows(x) for x in tensors if x is not None),
        lse,
        0.0,
        forward.upper is not None,
        attn_mask=additive_mask(forward, forward.mask),
        scale=forward.scale,
    )
    none = forward.query.new_empty((0,))
    return *grads, none, none


_OP = "aten._scaled_dot_product_flash_attention_for_cpu"
FLASH_CPU = Kernel("flash_cpu", _OP, _refuse, with_sinks(_emit))
FLASH_CPU_BOTTOM_RIGHT = Kernel(
    "flash_cpu_bottom_right",
    _OP,
    _refuse_bottom_right,
    with_sinks(_emit_bottom_right),
    _is_causal_beyond_the_diagonal,
)
FLASH_CPU_MASKED = Kernel("flash_cpu_masked", _OP, _refuse_any, with_sinks(_emit_masked))
FLASH_CPU_BACKWARD = BackwardKernel("flash_cpu_backward", f"{_OP}_backward", _refuse_backward, _emit_backward)
