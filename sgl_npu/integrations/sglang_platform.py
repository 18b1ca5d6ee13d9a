"""The NPU platform of SGLang diffusion with sgl_npu as its compiler; an entry point named `sgl_npu` leads here.

SGLANG_DIFFUSION_PLATFORM_OVERRIDE=sgl_npu sglang serve --model-path MODEL --enable-torch-compile
"""

from __future__ import annotations

import torch
from sglang.multimodal_gen.runtime.platforms.interface import PlatformEnum
from sglang.multimodal_gen.runtime.platforms.npu import NPUPlatformBase

from sgl_npu.integrations.sglang import CompileHooks

__all__ = ["NpuPlatform"]


class NpuPlatform(CompileHooks, NPUPlatformBase):
    """Everything of SGLang's own NPU platform that is not the compiler. SGLang asks only external platforms for one."""

    _enum = PlatformEnum.OOT
    dispatch_key = "PrivateUse1"

    def is_npu(self) -> bool:
        return hasattr(torch, "npu") and torch.npu.is_available()

    def get_device(self, local_rank: int) -> torch.device:
        return torch.device("npu", local_rank)

    def get_dispatch_key_name(self) -> str:
        return "npu"
