"""The decomposed reference: plain matmul and softmax in float32, for what no fused kernel of the platform takes."""

from __future__ import annotations

from sgl_npu.lowering.kernel import AttentionCall, BackwardCall, BackwardKernel, Kernel
from sgl_npu.runtime.attention import reference_attention, reference_attention_backward


def _options(call: AttentionCall) -> dict:
    return {"scale": call.scale, "softcap": call.softcap, "lower": call.lower, "upper": call.upper}


def _tensors(call: AttentionCall) -> tuple:
    return call.query, call.key, call.value, call.mask, call.bias, call.sinks


def _emit(call: AttentionCall):
    out, lse = reference_attention(*_tensors(call), **_options(call))
    return out, lse if call.needs_lse else None


def _emit_backward(call: BackwardCall):
    return reference_attention_backward(
        call.grad_out,
        call.grad_lse,
        call.out,
        call.lse,
        *_tensors(call.forward),
        **_options(call.forward),
        bias_grad=call.bias_grad,
        sinks_grad=call.sinks_grad,
    )


REFERENCE = Kernel("reference", "aten (decomposed)", lambda call: None, _emit)
REFERENCE_BACKWARD = BackwardKernel("reference_backward", "aten (decomposed)", lambda call: None, _emit_backward)
