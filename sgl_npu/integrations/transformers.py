"""Importing this module gives transformers the attention `attn_implementation="sgl_npu"`.

A mask function and an attention function, a pair. A mask that is nothing but a causal band is not built:

    None                    what it means to the library's sdpa: nothing is masked for one query or when the
                            module is not causal, else top-left causal
    no elements,            keys and queries end together (a dynamic KV cache), so `j - i <= Skv - Sq`; w > 0
    shape (1, 1, w, 0)      is a sliding window: a query sees no more than w keys, the last of them its own
    any other tensor        the mask, alone: bool (True = may attend) or additive

The attention calls the canonical op, which has a kernel of its own in eager mode and is a site when compiled.
Not every model tells its attention the window (Qwen2Moe does not), so the mask has to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from sgl_npu.runtime.attention import attention, band_mask
from sgl_npu.runtime.sizes import Size

__all__ = ["NAME", "attention_forward", "attention_mask"]

NAME = "sgl_npu"

logger = logging.get_logger(__name__)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward, in the spellings above; in doubt the tensor that the library's sdpa gets."""
    plain = mask_function is causal_mask_function if local_size is None else _is_window(config, local_size)
    # A static cache gives a tensor as offset: its keys run on behind the last query.
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if allow_is_causal_skip and plain and aligned and _no_padding(attention_mask, kv_length + kv_offset):
        window = 0 if local_size is None or kv_length <= local_size else local_size
        if window == 0 and (q_length == 1 or q_length == kv_length):
            return None
        return torch.empty((1, 1, window, 0), dtype=torch.bool, device=device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and (plain or local_size is not None),
        device=device,
        **kwargs,
    )


def _is_window(config: Any, local_size: int) -> bool:
    """A local size is a sliding window or the chunk size of chunked attention, then in the config."""
    chunk = getattr(config, "attention_chunk_size", None)
    return chunk is None and getattr(config, "sliding_window", None) == local_size


def _no_padding(mask: Tensor | None, length: int) -> bool:
    """No key is padding; a mask whose values are not there to be read may hold some."""
    if mask is None:
        return True
    return not is_tracing(mask) and mask.shape[-1] >= length and bool(mask.all())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over (B, H, S, D), kv heads not repeated; returns (B, S, H, D) and no weights.

    cu_seq_lens_q, cu_seq_lens_k: where packed documents end, with a 0 in front, as the library's flash attention takes
    them: of the tokens of all rows end to end.
    """
    if kwargs.get("output_attentions"):
        logger.warning_once("attn_implementation='sgl_npu' has no attention weights; use 'eager' for them")
    if kwargs.get("sinks") is not None:
        raise ValueError(
            f"{type(module).__name__} passes sinks per query: attn_implementation='sgl_npu' knows one sink "
            "per head (s_aux); use 'eager'"
        )
    if isinstance(cache, PagedAttentionCache):
        cu_seq_lens_q = cu_seq_lens_k = None  # continuous batching, whose mask says as much
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    rows, columns = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask, lower, upper = _band(attention_mask, rows, columns, causal)
    batch = query.shape[0]
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if batch > 1 and (mask is not None or position_bias is not None):
            raise ValueError(
                f"attn_implementation='sgl_npu': cu_seq_lens_q counts tokens of all {batch} rows end to end, but there "
                "is a mask or a position bias of each row; pack the documents into one row"
            )
        query, key, value = (_end_to_end(x) for x in (query, key, value))
        same, lower, upper = _documents(cu_seq_lens_q, cu_seq_lens_k, query.shape[2], key.shape[2], lower, upper)
        mask = _both(mask, same) if mask is None or mask.dtype == torch.bool else mask.masked_fill(~same, float("-inf"))
    if dropout > 0.0:
        kept = _both(mask, band_mask(query.shape[2], key.shape[2], lower, upper, query.device))
        out, _ = _with_dropout(
            module, query, key, value, kept, softcap, s_aux,
            dropout=dropout, scaling=scaling, is_causal=False, position_bias=position_bias, **kwargs,
        )  # fmt: skip
        return _in_rows(out, batch), None
    additive = position_bias
    if mask is not None and mask.dtype != torch.bool:
        additive, mask = mask if additive is None else mask + additive, None
    query, key, value = _autocast(query, key, value)
    if query.shape[0] != key.shape[0]:  # learned queries of batch 1
        query = query.expand(key.shape[0], -1, -1, -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(scale, Tensor):
        query, scale = query * scale, 1.0
    out, _ = attention(
        query,
        key,
        value,
        mask,
        additive,
        s_aux,
        scale=scale,
        softcap=softcap or 0.0,
        lower=lower,
        upper=upper,
    )
    return _in_rows(out.transpose(1, 2).contiguous(), batch), None


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What two bool masks keep together; None keeps everything."""
    if one is None or other is None:
        return one if other is None else other
    return one & other


def _in_rows(out: Tensor, batch: Size) -> Tensor:
    """(1, B * S, H, D) as (B, S, H, D), or what is of that batch already."""
    return out if out.shape[0] == batch else out.reshape(batch, -1, *out.shape[2:])


def _end_to_end(x: Tensor) -> Tensor:
    """(B, H, S, D) as (1, H, B * S, D)."""
    return x if x.shape[0] == 1 else x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _documents(
    query_ends: Tensor, key_ends: Tensor, rows: Size, columns: Size, lower: Size | None, upper: Size | None
) -> tuple[Tensor, Size | None, Size | None]:
    """(mask, lower, upper) of a band within each document, whose queries and keys end together."""
    i, j = (torch.arange(count, device=query_ends.device) for count in (rows, columns))
    behind = None if lower is None or upper is None else lower - upper  # a window ends at the query itself
    row, column = torch.bucketize(i, query_ends[1:], right=True), torch.bucketize(j, key_ends[1:], right=True)
    same = row[:, None] == column[None, :]
    if query_ends is key_ends:  # the band is the same in rows of the whole
        return same[None, None], behind, None if upper is None else 0
    ahead = (j - key_ends[1:][column.clamp(max=key_ends.numel() - 2)])[None, :]
    ahead = ahead - (i - query_ends[1:][row.clamp(max=query_ends.numel() - 2)])[:, None]
    if upper is not None:
        same = same & (ahead <= 0)
    if behind is not None:
        same = same & (ahead >= behind)
    return same[None, None], None, None


def _band(
    mask: Tensor | None, rows: Size, columns: Size, causal: bool
) -> tuple[Tensor | None, Size | None, Size | None]:
    """(mask, lower, upper) of what the mask function returned: a tensor or a band, never both."""
    if mask is None:
        return None, None, 0 if rows > 1 and causal else None
    if mask.dim() != 4 or mask.shape[-1] != 0:
        return mask, None, None
    upper = columns - rows
    window = mask.shape[2]
    return None, upper - (window - 1) if window > 0 else None, upper


def _with_dropout(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float | None,
    sinks: Tensor | None, dropout: float, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The canonical op has no dropout; the library's sdpa has, but neither softcap nor sinks."""
    for name, setting in (("softcap", softcap), ("sinks", sinks)):
        if setting is not None:
            raise ValueError(
                f"attention dropout = {dropout} together with {name}: no fused attention has both; set the "
                "config's attention_dropout to 0.0, call model.eval(), or use attn_implementation='eager'"
            )
    logger.warning_once(
        f"attention dropout = {dropout}: attn_implementation='sgl_npu' has none and leaves the call to 'sdpa'"
    )
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, **kwargs)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, float32 and half tensors go to its dtype, as in scaled_dot_product_attention."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if x.dtype in eligible else x for x in tensors)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
