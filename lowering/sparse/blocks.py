"""Attention over selected blocks where there is no NPU: FlexAttention under Inductor, block by block otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_npu.lowering.flex import flex, refuse_here
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.runtime.block_attention import block_attention


def blocks_op(call: AttentionCall) -> str:
    """The op that `attend_to_blocks` ends in."""
    return "flex_attention" if refuse_here(call) is None else "sgl_npu.block_attention"


def attend_to_blocks(call: AttentionCall, kept: Tensor) -> Tensor:
    """Attention of every block of 128 queries to the key blocks that `kept` (B, Hq, query and key blocks) selects."""
    if refuse_here(call) is not None:
        return block_attention(call.query, call.key, call.value, kept, call.scale)
    # Inductor's C++ FlexAttention wants a test of positions (torch 2.13); its CUDA kernel is faster without.
    test = _everything if call.query.device.type == "cpu" else None
    return flex(call, kept.sum(-1, dtype=torch.int32), listed_blocks(kept).to(torch.int32), test)


def listed_blocks(kept: Tensor) -> Tensor:
    """Int64, of the shape of `kept`: the selected blocks of each row in ascending order, then the others."""
    return torch.argsort(kept.to(torch.int8), dim=-1, descending=True, stable=True)


def _everything(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j >= 0
