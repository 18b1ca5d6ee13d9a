"""Which kernels a platform has, in the order they are tried. The last row of each table takes every call."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_npu.lowering.ascend_fa import ASCEND_FA, ASCEND_FA_LSE_SINK, ASCEND_FA_PADDED, ASCEND_FA_SINK
from sgl_npu.lowering.ascend_fusion_attention import FUSION_ATTENTION
from sgl_npu.lowering.ascend_packed import (
    ASCEND_PACKED,
    ASCEND_PACKED_PADDED,
    ASCEND_PACKED_SINK,
    ASCEND_PAGED_BATCHED,
)
from sgl_npu.lowering.flash_cpu import (
    FLASH_CPU,
    FLASH_CPU_BACKWARD,
    FLASH_CPU_BOTTOM_RIGHT,
    FLASH_CPU_MASKED,
)
from sgl_npu.lowering.flex import FLEX
from sgl_npu.lowering.kernel import BackwardKernel, Kernel
from sgl_npu.lowering.packed import PACKED_OP, PACKED_REFERENCE, PackedKernel
from sgl_npu.lowering.reference import REFERENCE, REFERENCE_BACKWARD
from sgl_npu.lowering.sdpa import SDPA, SDPA_MASKED


@dataclass(frozen=True)
class Platform:
    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[BackwardKernel, ...] = (REFERENCE_BACKWARD,)
    packed: tuple[PackedKernel, ...] = (PACKED_OP,)


PLATFORMS = {
    platform.name: platform
    for platform in (
        Platform(
            "cpu",
            (FLASH_CPU, FLASH_CPU_BOTTOM_RIGHT, FLEX, FLASH_CPU_MASKED, REFERENCE),
            (FLASH_CPU_BACKWARD, REFERENCE_BACKWARD),
        ),
        Platform("cuda", (SDPA, FLEX, SDPA_MASKED, REFERENCE)),
        Platform(
            "npu",
            (ASCEND_FA, ASCEND_FA_SINK, ASCEND_FA_LSE_SINK, ASCEND_FA_PADDED, FUSION_ATTENTION, REFERENCE),
            packed=(
                ASCEND_PACKED,
                ASCEND_PACKED_SINK,
                ASCEND_PACKED_PADDED,
                ASCEND_PAGED_BATCHED,
                PACKED_REFERENCE,
            ),
        ),
    )
}
