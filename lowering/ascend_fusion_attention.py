"""NPU: npu_fusion_attention_v3, the training op, for what inference's kernel refuses: float32, masks per head.

Its limits are the table in `sgl_npu.runtime.npu.rules`. It returns the softmax's maximum and sum, from which the lse
follows. torchair 2.13 has no converter for it to GE graphs; eager and ACL-graph execution take it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sgl_npu.lowering.ascend_layout import from_layout, input_layout, to_layout
from sgl_npu.lowering.ascend_mask import AscendMask, ascend_mask
from sgl_npu.lowering.kernel import AttentionCall, Kernel, head_counts, is_empty, with_sinks
from sgl_npu.runtime.npu import ensure_ops
from sgl_npu.runtime.npu.rules import FusionAttentionCall, first_violation


def _plan(call: AttentionCall) -> tuple[tuple[Tensor, Tensor, Tensor], AscendMask, str, int]:
    layout = input_layout(call)
    query, key, value = (to_layout(x, layout) for x in (call.query, call.key, call.value))
    return (query, key, value), ascend_mask(call), layout, head_counts(call)[0]


def _refuse(call: AttentionCall) -> str | None:
    if call.inner == "torchair":
        return "torchair has no converter of the op to GE; inner 'npugraph_ex' takes it"
    if call.softcap > 0.0:
        return f"softcap = {call.softcap}: the kernel has no softcap"
    if is_empty(call):
        return "an empty batch, query or key"
    tensors, mask, layout, heads = _plan(replace(call, sinks=None))
    return first_violation(
        FusionAttentionCall.of(
            *tensors,
            atten_mask=mask.atten_mask,
            pse=mask.pse_shift,
            layout=layout,
            head_num=heads,
            sparse_mode=mask.sparse_mode,
            pre_tokens=mask.pre_tokens,
            next_tokens=mask.next_tokens,
        )
    )


def _emit(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    ensure_ops()
    tensors, mask, layout, heads = _plan(call)
    settings: dict[str, Any] = {"scale": call.scale}
    if mask.pse_shift is not None:
        settings["pse"] = mask.pse_shift
    if mask.atten_mask is not None:
        settings |= {
            "atten_mask": mask.atten_mask,
            "sparse_mode": mask.sparse_mode,
            "pre_tockens": mask.pre_tokens,
            "next_tockens": mask.next_tokens,
        }
    out, maximum, total, *_ = torch.ops.npu.npu_fusion_attention_v3.default(*tensors, heads, layout, **settings)
    lse = (maximum + torch.log(total))[..., 0] if call.needs_lse else None
    return from_layout(out, layout), lse


FUSION_ATTENTION = Kernel("ascend_fusion_attention", "npu.npu_fusion_attention_v3", _refuse, with_sinks(_emit))
