"""What aten ops compute, written in the few ops that torchair 2.13 converts to GE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_npu.runtime.sizes import Size

_SPARE = 2  # rows that a constant has more than are used


def integer_histogram(x: Tensor, bins: int = 100, min: int = 0, max: int = 0) -> Tensor:
    """histc of integers between integer bounds: how many elements lie in each of `bins` equal parts of [min, max].

    Models count the tokens of every expert with it. Of floats it stays what it is.
    """
    if x.is_floating_point() or not (float(min).is_integer() and float(max).is_integer() and max > min):
        return NotImplemented
    low, high, x = int(min), int(max), x.flatten()
    part = ((x.long() - low) * bins // (high - low)).clamp(max=bins - 1)
    inside = (x >= low) & (x <= high)
    found = (part.unsqueeze(-1) == torch.arange(bins, device=x.device)) & inside.unsqueeze(-1)
    return found.sum(0).to(x.dtype)


def isnan(x: Tensor) -> Tensor:
    return x != x


def isfinite(x: Tensor) -> Tensor:
    return x.abs() < math.inf


def trunc(x: Tensor) -> Tensor:
    return torch.where(x < 0, x.ceil(), x.floor()) if x.is_floating_point() else x.clone()


def all_of(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """No element is zero."""
    if x.dtype == torch.uint8:
        return NotImplemented  # of these alone the result is no bool
    return (x == 0).any(dim, keepdim=keepdim).logical_not()


def exp2(x: Tensor) -> Tensor:
    return torch.pow(2.0, x)


def amax(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The largest element, one dimension after the other, the last first."""
    for axis in _axes(x, dim):
        x = x.max(axis, keepdim=keepdim).values
    return x


def amin(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The largest of what is turned around: torchair has max alone. `~` turns integers around, the smallest too."""
    if x.is_floating_point():
        return -amax(-x, dim, keepdim)
    return ~amax(~x, dim, keepdim)


def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    """The end of each dimension is put before its start. Without `dims`, of the flattened tensor."""
    if not dims:
        return roll(x.flatten(), shifts, (0,)).view(x.shape)
    for shift, axis in zip(shifts, dims, strict=True):
        size = x.size(axis)
        start = -shift % size if size else 0
        x = torch.cat((x.narrow(axis, start, size - start), x.narrow(axis, 0, start)), axis)
    return x


def pad(x: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
    """Constants before and after each dimension, the last dimension first. With numbers alone it stays what it is."""
    if all(isinstance(size, int) for size in pad) or any(isinstance(size, int) and size < 0 for size in pad):
        return NotImplemented
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        axis, length = x.dim() - number, x.size(x.dim() - number) + before + after
        ends = [_constant(x, axis, size, value) for size in (before, after)]
        parts = [part for part in (ends[0], x, ends[1]) if part is not None]
        if len(parts) > 1:
            x = torch.cat(parts, axis).narrow(axis, 0 if ends[0] is None else _SPARE, length)
    return x


def _constant(x: Tensor, axis: int, size: Size, value: float) -> Tensor | None:
    """Two more rows than `size`: a graph may be special to sizes 0 and 1. None for no row at all."""
    if isinstance(size, int) and size == 0:
        return None
    return x.new_full((*x.shape[:axis], size + _SPARE, *x.shape[axis + 1 :]), value)


def index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if x.dim() == 0 or source.dim() != x.dim():
        return NotImplemented
    return x.scatter(dim, _along(index, dim, source.shape), source)


def index_fill(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """Negative indices count from the end, which a scatter does not know."""
    if x.dim() == 0:
        return NotImplemented
    shape = list(x.shape)
    shape[dim] = index.numel()
    return x.scatter(dim, _along(torch.where(index < 0, index + x.size(dim), index), dim, shape), value)


def index_fill_tensor(x: Tensor, dim: int, index: Tensor, value: Tensor) -> Tensor:
    if x.dim() == 0:
        return NotImplemented
    shape = list(x.shape)
    shape[dim] = index.numel()
    return index_copy(x, dim, torch.where(index < 0, index + x.size(dim), index), value.to(x.dtype).expand(shape))


def var(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False):
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def std(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False):
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0].sqrt()


def std_mean(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False):
    variance, mean = var_mean(x, dim, correction=correction, keepdim=keepdim)
    return variance.sqrt(), mean


def var_mean(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False):
    """The mean of squared differences from the mean, in float32 at least, as of `correction` elements fewer (1)."""
    if x.is_complex():
        return NotImplemented
    axes = _axes(x, dim or ())
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(axes, keepdim=True)
    count = math.prod(x.size(axis) for axis in axes) - (1 if correction is None else correction)
    squares = (wide - mean).square().sum(axes, keepdim=keepdim)
    variance = squares / count if count > 0 else squares * math.inf
    for axis in axes if not keepdim else ():
        mean = mean.squeeze(axis)
    return variance.to(x.dtype), mean.to(x.dtype)


def trace(x: Tensor) -> Tensor:
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return torch.where(rows.unsqueeze(1) == columns, x, 0).sum()


def _axes(x: Tensor, dim: Sequence[int]) -> list[int]:
    """Dimensions counted from the start, the last first; all if none is named."""
    return sorted((axis % x.dim() for axis in dim), reverse=True) if dim else list(reversed(range(x.dim())))


def _along(index: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """An index of `dim` for every element of `shape`."""
    ones = [1] * len(shape)
    ones[dim] = -1
    return index.view(ones).expand(shape)
