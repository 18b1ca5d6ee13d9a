"""nn.MultiheadAttention and nn.TransformerEncoderLayer: torch functions that hide an attention inside."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.passes.capture_record import note_outcome
from sgl_npu.passes.capture_sdpa import canonical_sdpa


def multi_head_attention(*args: Any, site: int, **kwargs: Any):
    """`F.multi_head_attention_forward`, its inner attention captured (need_weights=True spells it by hand).

    That is the function's own code with another `scaled_dot_product_attention` among its globals. It must not hand
    itself over to a torch function mode, as it does while AOTAutograd traces: the original would run instead.
    """
    note_outcome(site, "need_weights=True: torch computes the probabilities by hand; pass need_weights=False")
    original = F.multi_head_attention_forward
    redirected = {
        **vars(F),
        "scaled_dot_product_attention": functools.partial(canonical_sdpa, site=site),
        "has_torch_function": lambda _: False,
    }
    forward = types.FunctionType(original.__code__, redirected, original.__name__, original.__defaults__)
    return forward(*args, **kwargs)


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
    *,
    site: int,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd`, the fast path of nn.TransformerEncoderLayer, in open ops.

    Masks mean what they mean there: nonzero = masked out; (S, S) for type 0, (B, S) for type 1, (B, H, S, S) for 2.
    """
    if src.is_nested:
        note_outcome(site, "a nested tensor: only strided tensors are captured")
        return torch._transformer_encoder_layer_fwd(
            src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, use_gelu, norm_first, eps,
            norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2,
            mask, mask_type,
        )  # fmt: skip

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, embed_dim // num_heads))
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    keep = None
    if mask is not None:
        keep = ~mask.to(torch.bool)
        keep = keep[:, None, None] if mask_type == 1 else keep
    out = canonical_sdpa(query, key, value, keep, site=site)
    x = src + F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)
    x = x if norm_first else norm(x, norm_weight_1, norm_bias_1)
    hidden = F.linear(norm(x, norm_weight_2, norm_bias_2) if norm_first else x, ffn_weight_1, ffn_bias_1)
    hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
    x = x + F.linear(hidden, ffn_weight_2, ffn_bias_2)
    return x if norm_first else norm(x, norm_weight_2, norm_bias_2)
