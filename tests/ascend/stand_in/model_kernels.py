"""Operators that model libraries call on an NPU, or that torch_npu computes where the CPU does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers calls it for every RMSNorm, on CPU tensors too. The second result is the reciprocal root, float32."""
    wide = x.float()
    reciprocal = torch.rsqrt(wide.square().mean(tuple(range(-gamma.dim(), 0)), keepdim=True) + epsilon)
    return (wide * reciprocal * gamma.float()).to(x.dtype), reciprocal


def _histc(x: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """The CPU counts floats only; transformers counts the tokens of every expert as integers on other devices."""
    return torch.histc(x.float(), bins, min, max).to(x.dtype)


KERNELS: dict[str, Callable[..., Any]] = {"npu::npu_rms_norm": _rms_norm}
NPU_KERNELS: dict[str, Callable[..., Any]] = {"aten::histc": _histc}
