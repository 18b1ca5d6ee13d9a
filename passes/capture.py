"""Dynamo's graph: attention calls become canonical nodes before AOTAutograd decomposes them.

before: scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=..., enable_gqa=...)
after:  canonical_sdpa(... the same ..., site=n), a plain function that AOTAutograd traces into `sgl_npu::attention`

Attention that is not captured is listed all the same: the report says why.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.lowering.ascend_cache import ascend_update_kv_cache
from sgl_npu.passes import near_miss
from sgl_npu.passes.capture_flex import capture_flex
from sgl_npu.passes.capture_mha import multi_head_attention, transformer_encoder_layer
from sgl_npu.passes.capture_order import visible_order
from sgl_npu.passes.capture_record import Capture
from sgl_npu.passes.capture_sdpa import canonical_sdpa
from sgl_npu.passes.capture_shape import keep_length_symbolic
from sgl_npu.passes.capture_varlen import capture_varlen, is_varlen
from sgl_npu.passes.model_numbers import specialise_norms, specialise_softcaps
from sgl_npu.passes.select_packed import PACKED_SPELLING
from sgl_npu.passes.site import mark_site
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.cache_update import update_kv_cache
from sgl_npu.runtime.packed_attention import packed_attention

SDPA_SPELLING = "scaled_dot_product_attention"
_SDPA_TARGETS = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_OPAQUE_TARGETS = {
    F.multi_head_attention_forward: ("nn.MultiheadAttention", multi_head_attention),
    torch._transformer_encoder_layer_fwd: ("nn.TransformerEncoderLayer fast path", transformer_encoder_layer),
}
_KEPT_TARGETS = {
    torch._native_multi_head_attention: "torch._native_multi_head_attention: torch's fast path is an opaque kernel",
}

keep_length_symbolic()


def capture_attention(gm: GraphModule, capture: Capture) -> None:
    """Redirect every attention call of the graph and of its nested graphs."""
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        specialise_softcaps(module.graph)
        if capture.platform == "npu":
            specialise_norms(module.graph)
        for node in module.graph.nodes:
            if near_miss.is_hand_written_attention(node):
                record = capture.new_record(node, near_miss.SPELLING)
                record.refusals.append(("capture", near_miss.REASON))
                mark_site(node, record)
            elif node.op == "call_function":
                _capture_node(node, capture)
        module.recompile()


def _capture_node(node: fx.Node, capture: Capture) -> None:
    if node.target in _SDPA_TARGETS:
        record = capture.new_record(node, SDPA_SPELLING)
        node.target = canonical_sdpa
        node.kwargs = {**node.kwargs, "order": visible_order(node)}
    elif node.target in _OPAQUE_TARGETS:
        spelling, replacement = _OPAQUE_TARGETS[node.target]
        record = capture.new_record(node, spelling)
        node.target = replacement
    elif node.target in _KEPT_TARGETS:
        record = capture.new_record(node, "nn.MultiheadAttention fast path")
        record.refusals.append(("capture", _KEPT_TARGETS[node.target]))
        return
    elif node.target in (attention, attention.overloadpacket):
        record = capture.new_record(node, "sgl_npu::attention")
        mark_site(node, record)
        return
    elif node.target in (packed_attention, packed_attention.overloadpacket):
        mark_site(node, capture.new_record(node, PACKED_SPELLING))
        return
    elif is_varlen(node.target):
        capture_varlen(node, capture)
        return
    elif node.target in (update_kv_cache, update_kv_cache.overloadpacket):
        if capture.platform == "npu":
            node.target = ascend_update_kv_cache
        return
    elif node.target is torch.ops.higher_order.flex_attention:
        capture_flex(node, capture)
        return
    else:
        return
    node.kwargs = {**node.kwargs, "site": record.id}
    mark_site(node, record)
