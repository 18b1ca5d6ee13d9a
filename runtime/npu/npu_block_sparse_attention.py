"""npu_block_sparse_attention without an NPU: shapes for tracing, numbers on the CPU (forward only).

Unlike in fused infer attention, 1 in the mask marks the blocks that are computed, and lengths are not cumulative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_npu.runtime.npu.layouts import sequences
from sgl_npu.runtime.npu.npu_block_sparse_rules import (
    KEY_BLOCK_MULTIPLE,
    NPU_BLOCK_SPARSE_RULES,
    NpuBlockSparseCall,
)
from sgl_npu.runtime.npu.rule import reject
from sgl_npu.runtime.npu.sequence_attention import attend

OP = "npu_block_sparse_attention"


@torch.no_grad()
def npu_block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_sparse_mask: torch.Tensor,
    block_shape: Sequence[int],
    *,
    q_input_layout: str = "TND",
    kv_input_layout: str = "TND",
    num_key_value_heads: int = 1,
    scale_value: float = 0.0,
    inner_precise: int = 1,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    softmax_lse_flag: int | None = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CPU kernel. Query, key and value are float16 or bfloat16; computed in float32, whatever `inner_precise` says.

    Returns the output like query, and the log-sum-exp as float32 (B, N, S, 1) or, packed, (T, N, 1). What the hardware
    leaves unwritten is 0: rows past a sequence's length, and the log-sum-exp without its flag. A row without any
    block has out 0 and log-sum-exp -inf. Raises RuntimeError with every rule that is broken.
    """
    call = NpuBlockSparseCall.of(
        query,
        key,
        value,
        block_sparse_mask,
        block_shape,
        q_input_layout=q_input_layout,
        kv_input_layout=kv_input_layout,
        num_key_value_heads=num_key_value_heads,
        inner_precise=inner_precise,
        actual_seq_lengths=actual_seq_lengths,
        actual_seq_lengths_kv=actual_seq_lengths_kv,
        softmax_lse_flag=softmax_lse_flag,
    )
    reject(OP, call, NPU_BLOCK_SPARSE_RULES)
    out, lse = (x.zero_() for x in _outputs(query, value))
    rows = actual_seq_lengths or [query.shape[2]] * query.shape[0]
    keys = actual_seq_lengths_kv or [key.shape[2]] * key.shape[0]
    for q, k, v, into, lse_into, mask in zip(
        sequences(q_input_layout, query, rows),
        sequences(kv_input_layout, key, keys),
        sequences(kv_input_layout, value, keys),
        sequences(q_input_layout, out, rows),
        sequences(q_input_layout, lse, rows),
        block_sparse_mask,
        strict=True,
    ):
        result = attend(q, k, v, scale=scale_value, removed=_removed(mask, q.shape[1], k.shape[1], block_shape))
        into.copy_(result.out)
        if softmax_lse_flag:
            lse_into.copy_(result.maximum + result.total.log())
    return out, lse


def _removed(mask: torch.Tensor, rows: int, keys: int, block_shape: Sequence[int]) -> torch.Tensor:
    """(N, rows, keys) bool, True where a sequence's mask (N, query blocks, key blocks) has no 1 for the key's block."""
    selected = (mask == 1).repeat_interleave(block_shape[0], 1)[:, :rows]
    return ~selected.repeat_interleave(block_shape[1], 2)[..., :keys]


def npu_block_sparse_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_sparse_mask: torch.Tensor,
    block_shape: Sequence[int],
    *,
    inner_precise: int = 1,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes, sizes possibly symbolic. Checks what the meta kernel of torch_npu 2.13.0 does."""
    torch._check(query.dim() in (3, 4), lambda: f"query has {query.dim()} axes, not one of (3, 4)")
    torch._check(
        len(block_shape) >= 2 and block_shape[1] % KEY_BLOCK_MULTIPLE == 0,
        lambda: f"block_shape = {list(block_shape)}; blocks of keys must be a multiple of {KEY_BLOCK_MULTIPLE}",
    )
    torch._check(
        query.dtype != torch.bfloat16 or inner_precise == 0,
        lambda: f"inner_precise = {inner_precise}; bfloat16 takes 0",
    )
    return _outputs(query, value)


def _outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty((*query.shape[:-1], 1), dtype=torch.float32)


def no_backward(ctx: object, *gradients: torch.Tensor) -> None:
    """The backward of the emulation: there is none. Raises RuntimeError."""
    raise RuntimeError(f"{OP}: the backward is not covered by the emulation")
