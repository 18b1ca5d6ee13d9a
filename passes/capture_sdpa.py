"""`scaled_dot_product_attention`, with every argument torch allows, as the canonical op.

The functions here stand in Dynamo's graph where the call stood and decide when AOTAutograd traces them, on the very
tensors they get: what they refuse runs as torch would have run it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.passes.capture_order import in_order
from sgl_npu.passes.capture_record import attempt, current_capture, other_device
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import guard


def canonical_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    site: int,
    order: tuple[int, ...] | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention` through the canonical op; the original where a rule refuses.

    `order` is the dimension order, slowest first, of torch's own result, where somebody could tell the difference.
    """

    def rewritten() -> Tensor:
        out = _captured_sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        return out if order is None else in_order(out, order)

    out = attempt(site, _refuse_sdpa(query, key, value, attn_mask, dropout_p, enable_gqa), rewritten)
    if out is not None:
        return out
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _captured_sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa) -> Tensor:
    """The canonical op on 4-D tensors, its result in the rank of the call."""
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if isinstance(query.size(-1), int) else query.size(-1) ** -0.5
    if not isinstance(scale, (int, float)):  # known at run time only: into the query, never read
        query, scale = query * scale, 1.0
    rank = query.dim()
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    query, key, value = (_four_dims(x, lead, enable_gqa) for x in (query, key, value))
    query, key, value = _match_heads(query, key, value)
    mask = None if attn_mask is None else _four_dims_mask(attn_mask, rank, lead, enable_gqa)
    is_bool = mask is not None and mask.dtype == torch.bool
    out, _ = attention(
        query,
        key,
        value,
        mask if is_bool else None,
        None if is_bool else mask,
        scale=float(scale),
        upper=0 if is_causal else None,
    )
    if rank > 4:
        out = out.unflatten(0, lead)
    elif rank < 4:
        out = out.flatten(0, 1) if rank == 3 else out[0, 0]
    return out


def _refuse_sdpa(query, key, value, attn_mask, dropout_p, enable_gqa) -> str | None:
    """The first rule under which torch keeps the call, or None."""
    tensors = [x for x in (query, key, value, attn_mask) if x is not None]
    if not isinstance(dropout_p, (int, float)) or dropout_p > 0.0:
        return f"dropout_p = {dropout_p}: the canonical op has no dropout; torch's own kernel draws it"
    if any(x.is_nested or x.layout != torch.strided for x in tensors):
        return "a nested or sparse tensor: only strided tensors are captured"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform (vmap, grad, jvp), for which the canonical op has no rule"
    if reason := other_device(query):
        return reason
    if not query.dtype.is_floating_point or torch.finfo(query.dtype).bits < 16:
        return f"query is {query.dtype}: only floating dtypes of 16 bits and more are captured"
    if query.dim() < 2 or not query.dim() == key.dim() == value.dim():
        return f"query, key and value have {query.dim()}, {key.dim()} and {value.dim()} dimensions"
    if guard(query.size(-1) == 0):
        return "D = 0: the default scale is infinite"
    if current_capture().platform == "cuda" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "training on CUDA: torch's own fused forward and backward are kept"
    heads, kv_heads = _heads(query), (_heads(key), _heads(value))
    shared = all(guard(n == heads) or guard(n == 1) or guard(heads == 1) for n in kv_heads)
    grouped = enable_gqa and guard(kv_heads[0] == kv_heads[1]) and guard(heads % kv_heads[0] == 0)
    if not (shared or grouped):
        return f"{heads} query heads over {kv_heads[0]} and {kv_heads[1]} key and value heads: no single group size"
    return None


def _heads(x: Tensor):
    return x.size(-3) if x.dim() >= 3 else 1


def autocast(*tensors: Tensor | None) -> list[Any]:
    """Autocast as torch does for scaled_dot_product_attention: float32 and half go to the autocast dtype."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return [x if x is None or x.dtype not in eligible else x.to(dtype) for x in tensors]


def _four_dims(x: Tensor, lead: torch.Size, enable_gqa: bool) -> Tensor:
    """(lead..., H, S, D) as (B, H, S, D); without a head dimension every leading entry is a batch of one head."""
    if x.dim() == 2:
        return x[None, None]
    if x.dim() == 3:
        return x.unsqueeze(0) if enable_gqa else x.unsqueeze(1)
    x = _expand(x, (*lead, *x.shape[-3:]))
    return x if x.dim() == 4 else x.flatten(0, x.dim() - 4)


def _four_dims_mask(mask: Tensor, rank: int, lead: torch.Size, enable_gqa: bool) -> Tensor:
    """A mask for (lead..., H, Sq, Skv) as one for (B, H, Sq, Skv), both by broadcasting, as small as it can stay."""
    missing = max(rank, 2) - mask.dim()
    mask = mask[(None,) * missing] if missing > 0 else mask
    if rank == 2:
        return mask[None, None]
    if rank == 3:
        return mask.unsqueeze(0) if enable_gqa else mask.unsqueeze(1)
    if rank == 4:
        return mask
    if all(guard(size == 1) for size in mask.shape[:-3]):
        return mask.flatten(0, rank - 4)
    return mask.expand(*lead, *mask.shape[-3:]).flatten(0, rank - 4)


def _expand(x: Tensor, shape: tuple) -> Tensor:
    """`x.expand(shape)`, and `x` itself where nothing is to be expanded, so that no idle node is left in the graph."""
    return x if all(guard(old == new) for old, new in zip(x.shape, shape, strict=True)) else x.expand(shape)


def _match_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast heads (and the batch of rank-3 calls) where torch would; one key head for all queries stays one."""
    batch = torch.broadcast_shapes(*((x.size(0),) for x in (query, key, value)))[0]
    kv_heads = torch.broadcast_shapes((key.size(1),), (value.size(1),))[0]
    heads = kv_heads if guard(query.size(1) == 1) else query.size(1)
    query = _expand(query, (batch, heads, *query.shape[2:]))
    key, value = (_expand(x, (batch, kv_heads, *x.shape[2:])) for x in (key, value))
    return query, key, value
