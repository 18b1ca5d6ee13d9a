"""Tokens of a grid in tiles of 8 x 8, so that a block of consecutive tokens is near in space, and back again.

    row-major   frame, row, column
    tiled       frame, tile row, tile column, row in the tile, column in the tile

Tiles at the lower and right edge are smaller where 8 does not divide the height or width, so both orders hold every
token exactly once, whatever the grid. Other tokens keep their places around the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.runtime.sizes import known

TILE = 8


def tiled_order(grid: TokenGrid, device: torch.device) -> Tensor:
    """Int64 (S,): the row of the sequence that stands at each place of the tiled one."""
    return torch.argsort(_places(grid, device))


def row_major_order(tiled: Tensor) -> Tensor:
    """Int64 (S,): the place in the tiled sequence of each row of the sequence, the inverse of `tiled_order`.

    Sorted out instead of computed as in `_places`: Inductor would compute it anew for every element that is read (torch
    2.13, which also fails to).
    """
    return torch.argsort(tiled)


def _places(grid: TokenGrid, device: torch.device) -> Tensor:
    token = torch.arange(grid.video, device=device)
    frame, rest = token // grid.frame, token % grid.frame
    row, column = rest // grid.width, rest % grid.width
    tile_row, tile_column = row // TILE, column // TILE
    rows = (grid.height - tile_row * TILE).clamp(max=TILE)
    columns = (grid.width - tile_column * TILE).clamp(max=TILE)
    before = tile_row * TILE * grid.width + tile_column * TILE * rows
    return _in_sequence(grid, frame * grid.frame + before + row % TILE * columns + column % TILE)


def _in_sequence(grid: TokenGrid, order: Tensor) -> Tensor:
    """The order of the whole sequence, given that of the grid's tokens."""
    parts = [order + grid.before]
    if not known(grid.before == 0):
        parts.insert(0, torch.arange(grid.before, device=order.device))
    if not known(grid.after == 0):
        parts.append(torch.arange(grid.after, device=order.device) + (grid.before + grid.video))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
