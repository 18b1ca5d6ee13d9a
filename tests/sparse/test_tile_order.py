"""The order of tokens in tiles: exact and undone exactly, whatever the grid."""

from __future__ import annotations

import pytest
import torch
from sparse.sparse_cases import GRIDS

from sgl_npu.lowering.sparse.tile_order import TILE, row_major_order, tiled_order
from sgl_npu.lowering.sparse.token_grid import TokenGrid

CPU = torch.device("cpu")


@pytest.mark.parametrize("around", [(0, 0), (5, 0), (3, 130)])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_comes_back_to_its_place(grid, around):
    where = TokenGrid(*grid, *around)
    tiled = tiled_order(where, CPU)
    assert torch.equal(tiled[row_major_order(tiled)], torch.arange(where.length))
    assert torch.equal(tiled.sort().values, torch.arange(where.length))


@pytest.mark.parametrize("grid", GRIDS)
def test_consecutive_tokens_are_those_of_one_tile_of_one_frame(grid):
    frames, height, width = grid
    tiled = tiled_order(TokenGrid(*grid), CPU)
    frame, row, column = tiled // (height * width), tiled // width % height, tiled % width
    tile = (frame * height + row // TILE) * width + column // TILE
    changes = int((tile[1:] != tile[:-1]).sum())
    assert changes + 1 == frames * -(-height // TILE) * -(-width // TILE)


def test_other_tokens_stay_where_they_are():
    tiled = tiled_order(TokenGrid(2, 8, 16, 3, 4), CPU)
    assert tiled[:3].tolist() == [0, 1, 2]
    assert tiled[-4:].tolist() == [259, 260, 261, 262]
    assert tiled[3 : 3 + 9].tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 3 + 16]
