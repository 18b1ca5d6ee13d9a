"""npu_fused_infer_attention_score and its _v2 without an NPU: shapes for tracing, numbers on the CPU.

The kernels raise RuntimeError with every rule of `rules.FIA_RULES` which the call breaks. The fakes check no
more than the meta kernel of torch_npu 2.13.0 does: head count, layout name and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sgl_npu.runtime.npu.fia_call import INT_MAX, FiaCall
from sgl_npu.runtime.npu.fia_mask_rules import COMPRESSED_MODES
from sgl_npu.runtime.npu.fia_numerics import FiaTensors, compute
from sgl_npu.runtime.npu.layouts import FIA_LAYOUTS, AxisSizes, build_shape, out_axes, query_axes, read_sizes
from sgl_npu.runtime.npu.rules import reject_violations
from sgl_npu.runtime.npu.sequence_attention import require_compressed_pattern
from sgl_npu.runtime.sizes import Size, guard

V1 = "npu_fused_infer_attention_score"
V2 = "npu_fused_infer_attention_score_v2"


def _run(
    op: str, tensors: FiaTensors, scale: float, others: dict[str, object], **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = tensors.atten_mask
    if mask is not None and mask.numel() == 0 and settings["sparse_mode"] == 0:
        tensors = tensors._replace(atten_mask=None)
    given: dict[str, Any] = tensors._asdict()
    call = FiaCall.of(**given, others=others, **settings)
    reject_violations(op, call)
    if call.sparse_mode in COMPRESSED_MODES and mask is not None:
        require_compressed_pattern(op, mask)
    return compute(call, tensors, scale)


@torch.no_grad()
def fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pse_shift: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = INT_MAX,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CPU kernel of version 1.

    Query, key and value are float16 or bfloat16 in the axes of `input_layout`. Returns the output in query's
    dtype and the axes the layout names, and the log-sum-exp as float32 (B, N, S, 1) or, packed, (T, N, 1);
    it is float32 (0,) unless `softmax_lse_flag` is set.
    """
    return _run(
        V1,
        FiaTensors(query, key, value, atten_mask, pse_shift, block_table),
        scale,
        others,
        version=1,
        layout=input_layout,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        inner_precise=inner_precise,
        softmax_lse_flag=softmax_lse_flag,
        actual_seq_lengths=actual_seq_lengths,
        actual_seq_lengths_kv=actual_seq_lengths_kv,
        block_size=block_size,
    )


@torch.no_grad()
def fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pse_shift: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = INT_MAX,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CPU kernel of version 2: version 1 under other argument names, plus `learnable_sink`.

    The sink is bfloat16 (N,): one more score per head, which takes part in the softmax and has no value.
    """
    return _run(
        V2,
        FiaTensors(query, key, value, atten_mask, pse_shift, block_table, learnable_sink),
        softmax_scale,
        others,
        version=2,
        layout=input_layout,
        num_heads=num_query_heads,
        num_key_value_heads=num_key_value_heads,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        inner_precise=inner_precise,
        softmax_lse_flag=return_softmax_lse,
        actual_seq_lengths=actual_seq_qlen,
        actual_seq_lengths_kv=actual_seq_kvlen,
        block_size=block_size,
    )


def fused_infer_attention_score_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    quant_scale2: torch.Tensor | None = None,
    query_rope: torch.Tensor | None = None,
    num_heads: int = 1,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    softmax_lse_flag: bool = False,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of version 1, sizes possibly symbolic."""
    dtype = _out_dtype(query, query_rope, quant_scale2)
    kv_heads = num_key_value_heads or num_heads
    paged = block_table is not None
    return _empty_outputs(query, value, input_layout, num_heads, kv_heads, paged, dtype, softmax_lse_flag)


def fused_infer_attention_score_v2_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_rope: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    quant_scale_out: torch.Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    input_layout: str = "BSH",
    return_softmax_lse: bool = False,
    out_dtype: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of version 2, sizes possibly symbolic."""
    torch._check(out_dtype is None, lambda: f"{V2}: out_dtype given: not covered by the emulation")
    dtype = _out_dtype(query, query_rope, quant_scale_out)
    kv_heads = num_key_value_heads or num_query_heads
    paged = block_table is not None
    return _empty_outputs(query, value, input_layout, num_query_heads, kv_heads, paged, dtype, return_softmax_lse)


def _out_dtype(query: torch.Tensor, rope: torch.Tensor | None, out_scale: torch.Tensor | None) -> torch.dtype:
    if out_scale is not None:
        return torch.int8
    if query.dtype == torch.int8:
        return torch.half if rope is None else rope.dtype
    return query.dtype


def _empty_outputs(
    query: torch.Tensor,
    value: torch.Tensor,
    layout: str,
    heads: int,
    kv_heads: int,
    paged: bool,
    dtype: torch.dtype,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(heads > 0, lambda: f"num_heads must be greater than 0, seen {heads}")
    torch._check(layout in FIA_LAYOUTS, lambda: f"layout {layout} is not supported")
    axes = query_axes(layout)
    torch._check(query.dim() == len(axes), lambda: f"query has {query.dim()} axes; layout {layout} has {len(axes)}")
    ranks = (3, 4, 5) if paged else (query.dim(),)
    torch._check(value.dim() in ranks, lambda: f"value has {value.dim()} axes, not one of {ranks}")
    sizes = read_sizes(axes, tuple(query.shape), heads)
    value_dim = _value_dim(value, axes, kv_heads, paged)
    if guard(value_dim == 0) or guard(sizes.dim == 0):
        value_dim = sizes.dim
    out = query.new_empty(build_shape(out_axes(layout), sizes._replace(dim=value_dim)), dtype=dtype)
    lse_shape = build_shape("TND" if "T" in axes else "BNSD", AxisSizes(*sizes[:3], dim=1))
    return out, query.new_empty(lse_shape if with_lse else (0,), dtype=torch.float32)


def _value_dim(value: torch.Tensor, axes: str, kv_heads: int, paged: bool) -> Size:
    if paged and value.dim() == 5:
        return value.shape[2] * value.shape[4]
    flat = value.dim() == 3 if paged else "H" in axes
    return value.shape[2] // kv_heads if flat else value.shape[-1]
