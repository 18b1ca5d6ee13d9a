"""sgl_npu::block_sparse_attention: attention over the key blocks that a mask selects for each block of queries.

The mask is per query head, 1 where a key block takes part. A causal call compares positions inside the blocks on the
diagonal; the blocks above it must not be selected. A block of queries that selects nothing gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_npu.runtime.npu.bnsd_call import BNSD_RULES, KERNEL_DOCS, BnsdCall, describe
from sgl_npu.runtime.npu.fia_call import Shape
from sgl_npu.runtime.npu.fia_rules import dtype_name, shapes_differ
from sgl_npu.runtime.npu.kernel_package import require
from sgl_npu.runtime.npu.rule import Rule, reject
from sgl_npu.runtime.npu.sequence_attention import attend
from sgl_npu.runtime.npu.sparse_blocks import SPARSE_SIZE, blocks, columns, removed_positions
from sgl_npu.runtime.sizes import guard

OP = "block_sparse_attention"
SCHEMA = (
    f"{OP}(Tensor query, Tensor key, Tensor value, Tensor sparse_mask, Tensor sparse_count, float scale,"
    " bool causal, int sparse_size=128) -> Tensor"
)
MAX_BATCH = 65536
MAX_HEADS = 256
MAX_GROUP = 64
MAX_DIM = 512
_TILING = (
    "sgl-kernel-npu csrc/attentions/csrc/ops/ada_block_sparse_attention/op_host/"
    "ada_block_sparse_attention_tiling.cpp @3f03db0c"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSparseCall(BnsdCall):
    """Arguments of block_sparse_attention."""

    sparse_mask: Shape
    sparse_mask_dtype: torch.dtype
    sparse_count: Shape
    sparse_count_dtype: torch.dtype
    sparse_size: int = SPARSE_SIZE


def _limits(call: BlockSparseCall) -> str | None:
    for name, size, highest in (
        ("B", call.query[0], MAX_BATCH),
        ("N", call.query[1], MAX_HEADS),
        ("N / Nk", call.query[1] // call.key[1], MAX_GROUP),
        ("D", call.dim, MAX_DIM),
    ):
        if guard(size > highest):
            return f"{name} = {size} exceeds {highest}"
    return None


def _sparse_size(call: BlockSparseCall) -> str | None:
    if call.sparse_size != SPARSE_SIZE:
        return f"sparse_size = {call.sparse_size}; the kernel takes {SPARSE_SIZE}"
    return None


def _mask(call: BlockSparseCall) -> str | None:
    expected = (*call.query[:2], blocks(call.rows, call.sparse_size), columns(call.keys, call.sparse_size))
    if call.sparse_mask_dtype != torch.int8:
        return f"sparse_mask is {dtype_name(call.sparse_mask_dtype)}; it must be int8"
    if shapes_differ(call.sparse_mask, expected):
        return f"sparse_mask is {tuple(call.sparse_mask)}; it must be {expected}"
    return None


def _count(call: BlockSparseCall) -> str | None:
    expected = (*call.query[:2], blocks(call.rows, call.sparse_size))
    if call.sparse_count_dtype != torch.int32:
        return f"sparse_count is {dtype_name(call.sparse_count_dtype)}; it must be int32"
    if shapes_differ(call.sparse_count, expected):
        return f"sparse_count is {tuple(call.sparse_count)}; it must be {expected}"
    return None


BLOCK_SPARSE_RULES: tuple[Rule, ...] = (
    *BNSD_RULES,
    Rule("limits", _TILING, _limits),
    Rule("sparse_size", KERNEL_DOCS, _sparse_size, gate=True),
    Rule("mask", KERNEL_DOCS, _mask),
    Rule("count", KERNEL_DOCS, _count),
)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    count: torch.Tensor,
    sparse_size: int,
) -> None:
    call = BlockSparseCall(
        **describe(query, key, value),
        sparse_mask=tuple(mask.shape),
        sparse_mask_dtype=mask.dtype,
        sparse_count=tuple(count.shape),
        sparse_count_dtype=count.dtype,
        sparse_size=sparse_size,
    )
    reject(OP, call, BLOCK_SPARSE_RULES)


def _check_values(mask: torch.Tensor, count: torch.Tensor, key_blocks: int, causal: bool) -> None:
    """Raises RuntimeError for masks that the hardware does not look at and gets wrong."""
    if not torch.equal(count.long(), mask.sum(-1)):
        raise RuntimeError(f"{OP}: sparse_count must be sparse_mask.sum(-1)")
    if ((mask != 0) & (mask != 1)).any():
        raise RuntimeError(f"{OP}: sparse_mask holds {mask.unique().tolist()}; it may hold 0 and 1")
    if mask[..., key_blocks:].any():
        raise RuntimeError(f"{OP}: sparse_mask selects columns past the {key_blocks} key blocks")
    if causal and mask.triu(1).any():
        raise RuntimeError(f"{OP}: causal = True, but sparse_mask selects blocks above the diagonal")


@torch.no_grad()
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sparse_mask: torch.Tensor,
    sparse_count: torch.Tensor,
    scale: float,
    causal: bool,
    sparse_size: int = SPARSE_SIZE,
) -> torch.Tensor:
    """CPU kernel. A causal call counts positions from the top left corner."""
    _check(query, key, value, sparse_mask, sparse_count, sparse_size)
    _check_values(sparse_mask, sparse_count, blocks(key.shape[2], sparse_size), causal)
    removed = removed_positions(sparse_mask, query.shape[2], key.shape[2], sparse_size, causal)
    tensors = zip(query, key, value, removed, strict=True)
    return torch.stack([attend(q, k, v, scale=scale, removed=r).out for q, k, v, r in tensors]).to(query.dtype)


def block_sparse_attention_fake(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Shape and dtype, sizes possibly symbolic."""
    return query.new_empty(query.shape)


def block_sparse_attention_npu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sparse_mask: torch.Tensor,
    sparse_count: torch.Tensor,
    scale: float,
    causal: bool,
    sparse_size: int = SPARSE_SIZE,
) -> torch.Tensor:
    """NPU kernel: sgl-kernel-npu's. Values of the mask are not looked at: that would wait for the device."""
    _check(query, key, value, sparse_mask, sparse_count, sparse_size)
    return require(OP)(
        query=query.contiguous(),
        key=key.contiguous(),
        value=value.contiguous(),
        sparse_mask=sparse_mask.contiguous(),
        sparse_count_table=sparse_count.contiguous(),
        input_layout="BNSD",
        sparse_size=sparse_size,
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale_value=scale,
        causal=causal,
        inner_precise=1,
    )
