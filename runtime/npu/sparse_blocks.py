"""Blocks of a sparse attention: how many there are, and the int8 mask that selects key blocks per query block."""

from __future__ import annotations

import torch

from sgl_npu.runtime.sizes import Size

SPARSE_SIZE = 128
# The mask has one column per key block, rounded up to the width of a vector register.
COLUMN_MULTIPLE = 32


def blocks(length: Size, sparse_size: int) -> Size:
    """Number of blocks that cover `length` positions."""
    return (length + sparse_size - 1) // sparse_size


def columns(length: Size, sparse_size: int) -> Size:
    """Number of columns of a block mask over `length` keys."""
    return (blocks(length, sparse_size) + COLUMN_MULTIPLE - 1) // COLUMN_MULTIPLE * COLUMN_MULTIPLE


def removed_positions(mask: torch.Tensor, rows: int, keys: int, sparse_size: int, causal: bool) -> torch.Tensor:
    """(..., rows, keys) bool, True where a mask (..., row blocks, columns) does not select the key."""
    selected = mask.bool().repeat_interleave(sparse_size, -1)[..., :keys]
    selected = selected.repeat_interleave(sparse_size, -2)[..., :rows, :]
    return ~selected.tril() if causal else ~selected
