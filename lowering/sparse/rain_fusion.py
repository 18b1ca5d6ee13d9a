"""Rain fusion: blocks of near tokens, chosen by the mean query and key of each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sparse.blocks import attend_to_blocks, listed_blocks
from sgl_npu.lowering.sparse.selection import BLOCK, block_count, pooled_blocks
from sgl_npu.lowering.sparse.setting import SparseSetting
from sgl_npu.lowering.sparse.tile_order import row_major_order, tiled_order
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.runtime.npu.package_ops import ensure_package_ops
from sgl_npu.runtime.npu.rain_fusion_attention import RAIN_FUSION_RULES, RainFusionCall
from sgl_npu.runtime.npu.rule import broken_rules
from sgl_npu.runtime.sizes import specialise

RAIN_FUSION_OP = "sgl_npu.rain_fusion_attention"


def emit_rain_fusion(call: AttentionCall, grid: TokenGrid, setting: SparseSetting) -> Tensor:
    """Without an NPU."""
    return _in_tiles(call, grid, setting, attend_to_blocks)


def emit_rain_fusion_npu(call: AttentionCall, grid: TokenGrid, setting: SparseSetting) -> Tensor:
    """By the kernel of sgl-kernel-npu that takes a list of blocks."""
    return _in_tiles(call, grid, setting, _attend_to_listed)


def refuse_rain_fusion_npu(call: AttentionCall, setting: SparseSetting) -> str | None:
    """The clause of the kernel that the call breaks."""
    batch, heads, rows = specialise(call.query.size(0)), call.query.size(1), block_count(call.query.size(2))
    listed = (batch * rows, heads)
    given = RainFusionCall(
        query=tuple(call.query.shape),
        key=tuple(call.key.shape),
        value=tuple(call.value.shape),
        dtypes=(call.query.dtype, call.key.dtype, call.value.dtype),
        select_idx=(*listed, block_count(call.key.size(2))),
        select_num_idx=listed,
        select_dtypes=(torch.int64, torch.int64),
        actual_seq_qlen=[call.query.size(2)] * batch,
        actual_seq_kvlen=[call.key.size(2)] * batch,
        block_shape=(BLOCK, BLOCK),
        input_layout="BNSD",
    )
    return next((sentence for _, sentence in broken_rules(given, RAIN_FUSION_RULES)), None)


def _in_tiles(
    call: AttentionCall,
    grid: TokenGrid,
    setting: SparseSetting,
    attend: Callable[[AttentionCall, Tensor], Tensor],
) -> Tensor:
    order = tiled_order(grid, call.query.device)
    query, key, value = (x.index_select(2, order) for x in (call.query, call.key, call.value))
    tiled = replace(call, query=query, key=key, value=value)
    out = attend(tiled, pooled_blocks(tiled, grid, setting.sparsity))
    return out.index_select(2, row_major_order(order))


def _attend_to_listed(call: AttentionCall, kept: Tensor) -> Tensor:
    ensure_package_ops()
    batch = specialise(call.query.size(0))  # as many lengths are listed
    count = kept.sum(-1)
    named = torch.arange(kept.size(-1), device=kept.device) < count.unsqueeze(-1)
    listed = torch.where(named, listed_blocks(kept), -1)
    return torch.ops.sgl_npu.rain_fusion_attention.default(
        call.query,
        call.key,
        call.value,
        listed.transpose(1, 2).flatten(0, 1),
        count.transpose(1, 2).flatten(0, 1),
        [call.query.size(2)] * batch,
        [call.key.size(2)] * batch,
        call.scale,
        [BLOCK, BLOCK],
        "BNSD",
        0,
    )
