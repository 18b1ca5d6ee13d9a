"""Which blocks are kept, and that nothing but these is computed."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from sparse.sparse_cases import call_on, dense, positions

from sgl_npu.lowering.sparse import block_sparse, rain_fusion
from sgl_npu.lowering.sparse.selection import block_count, estimated_blocks, pooled_blocks, sampled_weights
from sgl_npu.lowering.sparse.setting import BLOCK_SPARSE, RAIN_FUSION, SparseSetting
from sgl_npu.lowering.sparse.tile_order import tiled_order
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.runtime.block_attention import block_attention

SELECTIONS = pytest.mark.parametrize("select", [pooled_blocks, estimated_blocks])
HALF = Fraction(1, 2)


@SELECTIONS
@pytest.mark.parametrize("sparsity", ["0", "0.3", "0.5", "0.8", "0.99"])
def test_each_row_keeps_as_many_blocks_as_the_sparsity_leaves(select, sparsity):
    grid = TokenGrid(1, 40, 50)  # a picture: no frame is kept whole
    kept = select(call_on(grid), grid, Fraction(sparsity))
    least = -(-16 * (1 - Fraction(sparsity)) // 1)
    counts = kept.sum(-1)
    if select is pooled_blocks:
        assert torch.all(counts == int(least))
    else:  # and the ends and the diagonal
        assert torch.all((counts >= int(least)) & (counts <= int(least) + 3))
        assert kept[..., 0].all() and kept[..., -1].all() and kept.diagonal(dim1=2, dim2=3).all()


@SELECTIONS
def test_rows_and_columns_of_text_and_the_first_frame_are_kept_whole(select):
    grid = TokenGrid(5, 16, 16, 130, 200)  # blocks 0-3 have a token of the first 386, blocks 11-12 one of the last 200
    kept = select(call_on(grid), grid, Fraction("0.95"))
    count = block_count(grid.length)
    whole = torch.tensor([block * 128 < 386 or (block + 1) * 128 > 1410 for block in range(count)])
    assert kept[:, :, whole].all() and kept[..., whole].all()
    assert not kept[:, :, ~whole][..., ~whole].all()


@SELECTIONS
def test_every_sample_and_head_has_blocks_of_its_own(select):
    grid = TokenGrid(1, 40, 50)
    kept = select(call_on(grid, batch=3, heads=4, kv_heads=2), grid, HALF)
    assert kept.shape == (3, 4, 16, 16)
    assert len({tuple(x.flatten().tolist()) for x in kept.flatten(0, 1)}) == 12


def test_the_highest_pooled_scores_are_kept():
    grid = TokenGrid(1, 32, 32)
    call = call_on(grid, heads=1, kv_heads=1)
    mean = [x.unflatten(2, (8, 128)).mean(3) for x in (call.query, call.key)]
    highest = (mean[0] @ mean[1].transpose(2, 3)).topk(4).indices
    assert torch.equal(pooled_blocks(call, grid, HALF), torch.zeros(1, 1, 8, 8).scatter(3, highest, 1).bool())


def test_sampled_weights_are_those_of_the_samples():
    """Of 8 tokens, along antidiagonals: every key, and of each block of queries two samples that are far apart."""
    call = call_on(TokenGrid(1, 25, 41), heads=1, kv_heads=1)  # 1025 tokens: the last sample is one key
    query, key = (torch.nn.functional.pad(x[0, 0].double(), (0, 0, 0, 127)) for x in (call.query, call.key))
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for block in range(9):
        for start in (0, 80):
            rows = query[block * 128 + start :][:8]
            scores = [(rows * key[k : k + 8].flip(0)).sum() * call.scale / 8 for k in range(0, 1025, 8)]
            weights = torch.nn.functional.pad(torch.stack(scores).softmax(0), (0, 15))
            expected[block] += weights.view(9, 16).sum(1)
    assert torch.allclose(sampled_weights(call)[0, 0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 500])
def test_block_attention_is_attention_to_the_blocks(length, kv_heads):
    grid = TokenGrid(1, 1, length)
    call = call_on(grid, batch=2, heads=4, kv_heads=kv_heads)
    count = block_count(length)
    blocks = (torch.rand(2, 4, count, count) < 0.5) | torch.eye(count, dtype=torch.bool)
    found = block_attention(call.query, call.key, call.value, blocks, call.scale)
    assert torch.allclose(found.double(), dense(call, positions(blocks, length)), atol=1e-5)


def test_block_attention_under_opcheck():
    call = call_on(TokenGrid(1, 10, 20))
    blocks = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    given = (call.query, call.key, call.value, blocks, call.scale)
    torch.library.opcheck(
        torch.ops.sgl_npu.block_attention.default, given, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("grid", [TokenGrid(3, 16, 20), TokenGrid(2, 9, 17, 11, 30), TokenGrid(4, 12, 20)], ids=str)
@pytest.mark.parametrize("method", [RAIN_FUSION, BLOCK_SPARSE])
def test_without_sparsity_it_is_dense_attention(method, grid):
    call, setting = call_on(grid, batch=3, heads=4), SparseSetting(method)
    emit = rain_fusion.emit_rain_fusion if method == RAIN_FUSION else block_sparse.emit_block_sparse
    assert torch.allclose(emit(call, grid, setting).double(), dense(call), atol=1e-5)


@pytest.mark.parametrize("grid", [TokenGrid(3, 16, 20), TokenGrid(3, 13, 21, 11, 30)], ids=str)
def test_rain_fusion_attends_to_the_blocks_of_the_tiled_sequence(grid):
    call, setting = call_on(grid, batch=3, heads=4, kv_heads=2), SparseSetting(RAIN_FUSION, HALF)
    tiled = tiled_order(grid, torch.device("cpu"))
    moved = call_on(grid, batch=3, heads=4, kv_heads=2)
    moved = type(moved)(*(x[:, :, tiled] for x in (call.query, call.key, call.value)), scale=call.scale)
    expected = torch.empty_like(dense(call))
    allowed = positions(pooled_blocks(moved, grid, HALF), grid.length)
    assert not allowed.all()
    expected[:, :, tiled] = dense(moved, allowed)
    assert torch.allclose(rain_fusion.emit_rain_fusion(call, grid, setting).double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_npu_computes_the_same_rain_fusion(dtype):
    grid, setting = TokenGrid(3, 13, 21, 11, 30), SparseSetting(RAIN_FUSION, HALF)
    call = call_on(grid, dtype, batch=3, heads=4, kv_heads=2)
    assert rain_fusion.refuse_rain_fusion_npu(call, setting) is None
    found = rain_fusion.emit_rain_fusion_npu(call, grid, setting)
    assert torch.allclose(found.float(), rain_fusion.emit_rain_fusion(call, grid, setting).float(), atol=8e-3)


def test_the_npu_keeps_whole_rows_of_block_sparse_attention():
    grid, setting = TokenGrid(3, 20, 32, 130), SparseSetting(BLOCK_SPARSE, Fraction("0.8"))
    call = call_on(grid, torch.float16)
    assert block_sparse.refuse_block_sparse_npu(call, setting) is None
    found, expected = block_sparse.emit_block_sparse_npu(call, grid, setting).double(), dense(call)
    whole = 130 + 640 - (130 + 640) % 128
    assert torch.allclose(found[:, :, :whole], expected[:, :, :whole], atol=2e-3)
    assert not torch.allclose(found[:, :, whole + 128 :], expected[:, :, whole + 128 :], atol=2e-3)
