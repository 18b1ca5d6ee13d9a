"""npu_scatter_nd_update without an NPU: rows put at places of a tensor, the others as they are.

The functional form, which torch_npu's compilers turn into the writing one where a copy back to the input follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

OP = "npu_scatter_nd_update"


def scatter_nd_update(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """CPU kernel: `input` with `updates` (K..., rest) at the places `indices` (K..., A) of its first A dimensions.

    Raises RuntimeError where dtypes or shapes break the documented limits, or an index is out of range.
    """
    _check(input, indices, updates)
    places = indices.long().unbind(-1)
    for dim, place in enumerate(places):
        if place.numel() and not (int(place.min()) >= 0 and int(place.max()) < input.shape[dim]):
            raise RuntimeError(
                f"{OP}: indices of dimension {dim} run from {int(place.min())} to {int(place.max())}; "
                f"input has {input.shape[dim]} there"
            )
    return input.clone(memory_format=torch.contiguous_format).index_put_(places, updates)


def scatter_nd_update_fake(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Shape and dtype, as torch_npu's meta kernel has them."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _check(input: Tensor, indices: Tensor, updates: Tensor) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"{OP}: indices is {indices.dtype}; it must be int32 or int64")
    if updates.dtype != input.dtype:
        raise RuntimeError(f"{OP}: updates is {updates.dtype} but input is {input.dtype}; they must agree")
    if indices.dim() < 2 or indices.shape[-1] > input.dim():
        raise RuntimeError(
            f"{OP}: indices is {tuple(indices.shape)}; it must have two dimensions or more, the last at most "
            f"{input.dim()}"
        )
    expected = (*indices.shape[:-1], *input.shape[indices.shape[-1] :])
    if tuple(updates.shape) != expected:
        raise RuntimeError(f"{OP}: updates is {tuple(updates.shape)}; it must be {expected}")
