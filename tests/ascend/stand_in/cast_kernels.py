"""Casts of torch_npu, which AOTAutograd puts into graphs traced on npu, and memory formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _cast(tensor: torch.Tensor, dtype: torch.dtype, *_: Any) -> torch.Tensor:
    return tensor.to(dtype)


def _format_cast(tensor: torch.Tensor, acl_format: int, **_: Any) -> torch.Tensor:
    """A format is an order in memory. torch_npu itself stays with the plain one, unless told otherwise."""
    return tensor.clone()


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::_npu_dtype_cast": _cast,
    "npu::_npu_dtype_cast_backward": _cast,
    "npu::npu_dtype_cast": _cast,
    "npu::npu_dtype_cast_backward": _cast,
    "npu::npu_format_cast": _format_cast,
}
