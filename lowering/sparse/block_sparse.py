"""Block-sparse attention: the blocks are estimated from samples of queries and keys, in the order of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sparse.blocks import attend_to_blocks
from sgl_npu.lowering.sparse.selection import block_count, estimated_blocks, whole_rows
from sgl_npu.lowering.sparse.setting import SparseSetting
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.runtime.npu.block_sparse_attention import BLOCK_SPARSE_RULES, BlockSparseCall
from sgl_npu.runtime.npu.bnsd_call import describe
from sgl_npu.runtime.npu.package_ops import ensure_package_ops
from sgl_npu.runtime.npu.rule import broken_rules
from sgl_npu.runtime.npu.sparse_block_estimate import ESTIMATE_RULES, EstimateCall
from sgl_npu.runtime.npu.sparse_blocks import SPARSE_SIZE, columns

BLOCK_SPARSE_OP = "sgl_npu.block_sparse_attention"


def emit_block_sparse(call: AttentionCall, grid: TokenGrid, setting: SparseSetting) -> Tensor:
    """Without an NPU."""
    return attend_to_blocks(call, estimated_blocks(call, grid, setting.sparsity))


def refuse_block_sparse_npu(call: AttentionCall, setting: SparseSetting) -> str | None:
    """The clause of either kernel that the call breaks."""
    estimate = EstimateCall(**describe(call.query, call.key), causal=False, row_sparse=float(1 - setting.sparsity))
    blocks = (*call.query.shape[:2], block_count(call.query.size(2)))
    attention = BlockSparseCall(
        **describe(call.query, call.key, call.value),
        sparse_mask=(*blocks, columns(call.key.size(2), SPARSE_SIZE)),
        sparse_mask_dtype=torch.int8,
        sparse_count=blocks,
        sparse_count_dtype=torch.int32,
    )
    broken = [*broken_rules(estimate, ESTIMATE_RULES), *broken_rules(attention, BLOCK_SPARSE_RULES)]
    return broken[0][1] if broken else None


def emit_block_sparse_npu(call: AttentionCall, grid: TokenGrid, setting: SparseSetting) -> Tensor:
    """The kernel's own estimate, with the rows and columns that are kept whole."""
    ensure_package_ops()
    ops = torch.ops.sgl_npu
    mask, _ = ops.sparse_block_estimate.default(
        call.query, call.key, call.scale, False, 1.0, float(1 - setting.sparsity), True, True
    )
    rows, count = mask.size(2), block_count(call.key.size(2))
    whole = whole_rows(grid, mask.size(3), mask.device)
    real = torch.arange(mask.size(3), device=mask.device) < count
    kept = (mask.bool() | whole | whole[:rows].unsqueeze(-1)) & real
    return ops.block_sparse_attention.default(
        call.query, call.key, call.value, kept.to(torch.int8), kept.sum(-1, dtype=torch.int32), call.scale, False
    )
