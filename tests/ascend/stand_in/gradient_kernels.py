"""Gradients that torch_npu computes by one operator, where the CPU has none or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _matmul_backward(
    grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """torch_npu keeps `matmul` whole, so its gradient has to be one operator too."""
    # A vector is a matrix with one row on the left, with one column on the right.
    rows = left.unsqueeze(0) if left.dim() == 1 else left
    columns = right.unsqueeze(-1) if right.dim() == 1 else right
    grad = grad.unsqueeze(-1) if right.dim() == 1 else grad
    grad = grad.unsqueeze(-2) if left.dim() == 1 else grad
    if columns.dim() == 2:
        # As the CPU does it: one product of matrices, so that the sums are rounded alike.
        grad_left = grad.flatten(0, -2).mm(columns.mT).view(rows.shape)
        grad_right = rows.flatten(0, -2).mT.mm(grad.flatten(0, -2))
    else:
        grad_left, grad_right = grad.matmul(columns.mT), rows.mT.matmul(grad)
    return (
        grad_left.sum_to_size(rows.shape).view(left.shape) if mask[0] else None,
        grad_right.sum_to_size(columns.shape).view(right.shape) if mask[1] else None,
    )


def _repeat_interleave_backward(
    grad: torch.Tensor, repeated: torch.Tensor, repeats: int | torch.Tensor, dim: int | None = None
) -> torch.Tensor:
    """Every element receives the gradients of its copies. Without `dim` the copies are those of all elements."""
    target = repeated.flatten() if dim is None else repeated
    axis = 0 if dim is None else dim
    source = torch.arange(target.shape[axis]).repeat_interleave(repeats)
    return torch.zeros_like(target).index_add(axis, source, grad).view(repeated.shape)


KERNELS: dict[str, Callable[..., Any]] = {
    "aten::matmul_backward": _matmul_backward,
    "npu::repeat_interleave_backward_int": _repeat_interleave_backward,
    "npu::repeat_interleave_backward_tensor": _repeat_interleave_backward,
}
