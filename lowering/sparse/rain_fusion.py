"""Rain fusion: blocks of near tokens, chosen by the mean query and key of each block.

Two kernels of Ascend compute it: that of sgl-kernel-npu takes lists of blocks, that of torch_npu a mask of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, head_counts
from sgl_npu.lowering.sparse.blocks import attend_to_blocks
from sgl_npu.lowering.sparse.selection import BLOCK, block_count, pooled_blocks
from sgl_npu.lowering.sparse.setting import SparseSetting
from sgl_npu.lowering.sparse.tile_order import row_major_order, tiled_order
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.runtime.npu import ensure_ops
from sgl_npu.runtime.npu.npu_block_sparse_rules import DIMS, NPU_BLOCK_SPARSE_RULES, NpuBlockSparseCall
from sgl_npu.runtime.npu.package_ops import ensure_package_ops
from sgl_npu.runtime.npu.rain_fusion_attention import RAIN_FUSION_RULES, RainFusionCall
from sgl_npu.runtime.npu.rule import broken_rules
from sgl_npu.runtime.sizes import specialise

RAIN_FUSION_OP = "sgl_npu.rain_fusion_attention"
BLOCK_MASK_OP = "npu.npu_block_sparse_attention"
_NO_BLOCK = 2**31 - 1  # sorts behind every block
_FLOAT32_SOFTMAX = 0  # inner_precise: the default, float16, may overflow


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


def emit_block_mask_npu(call: AttentionCall, grid: TokenGrid, setting: SparseSetting) -> Tensor:
    """By the kernel of torch_npu that takes a mask of blocks."""
    return _in_tiles(call, grid, setting, _attend_to_masked)


def refuse_block_mask_npu(call: AttentionCall, setting: SparseSetting) -> str | None:
    """The clause of the kernel that the padded call breaks."""
    query, key, value = _padded(call)
    rows, keys = (block_count(x.size(2)) for x in (query, key))
    given = NpuBlockSparseCall.of(
        query,
        key,
        value,
        query.new_empty((*query.shape[:2], rows, keys), dtype=torch.int8),
        [BLOCK, BLOCK],
        **_block_mask_settings(call),
    )
    return next((sentence for _, sentence in broken_rules(given, NPU_BLOCK_SPARSE_RULES)), None)


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
    count, blocks = kept.sum(-1), torch.arange(kept.size(-1), device=kept.device)
    listed = torch.where(kept, blocks, _NO_BLOCK).sort(-1).values  # GE has no stable sort, which could do without
    listed = listed.masked_fill(listed == _NO_BLOCK, -1)
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


def _attend_to_masked(call: AttentionCall, kept: Tensor) -> Tensor:
    ensure_ops()
    out, _ = torch.ops.npu.npu_block_sparse_attention.default(
        *_padded(call), kept.to(torch.int8), [BLOCK, BLOCK], scale_value=call.scale, **_block_mask_settings(call)
    )
    return out[..., : call.value.size(3)]


def _block_mask_settings(call: AttentionCall) -> dict[str, Any]:
    """Without lists of lengths every sequence is as long as the tensor, a symbol too."""
    return {
        "q_input_layout": "BNSD",
        "kv_input_layout": "BNSD",
        "num_key_value_heads": head_counts(call)[1],
        "inner_precise": _FLOAT32_SOFTMAX,
    }


def _padded(call: AttentionCall) -> tuple[Tensor, ...]:
    """Query, key and value with zeros behind each head, up to the kernel's next size: they change no score."""
    given = specialise(call.query.size(3))
    missing = next((dim - given for dim in DIMS if given <= dim), 0)
    return tuple(F.pad(x, (0, missing)) if missing else x for x in (call.query, call.key, call.value))
