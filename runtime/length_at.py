"""The op `sgl_npu::length_at`: an entry of a tensor of lengths as a number, for ops that take lists of them.

It waits for the device. Where a graph is captured its results become inputs, read before the graph runs
(`sgl_npu.passes.hoist`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from sgl_npu.runtime.sizes import Size

OP_NAME = "sgl_npu::length_at"

torch.library.define(OP_NAME, "(Tensor lengths, int index) -> SymInt", tags=torch.Tag.pt2_compliant_tag)

length_at = torch.ops.sgl_npu.length_at.default


@torch.library.impl(OP_NAME, "CompositeExplicitAutograd")
def _kernel(lengths: Tensor, index: int) -> int:
    return int(lengths[index])


@torch.library.register_fake(OP_NAME)
def _fake(lengths: Tensor, index: int) -> Size:
    mode = detect_fake_mode(lengths)
    assert mode is not None and mode.shape_env is not None
    return mode.shape_env.create_unbacked_symint()
