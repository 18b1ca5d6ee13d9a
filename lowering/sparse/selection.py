"""Which blocks of 128 keys each block of 128 queries attends to: bool (B, Hq, query blocks, key blocks).

Both methods keep the blocks with the highest scores, as many as the sparsity leaves, per batch and head. Rows and
columns of text and of the first frame of a video are kept whole.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.runtime.sizes import Size, guard, known

BLOCK = 128
# Of the samples that block-sparse attention is estimated from, as Ascend's kernel has it. Of the 16 samples of a block
# of queries the first and the eleventh are taken, which are at different columns of a frame too: all of them take eight
# times the time and find little more of the softmax (8192 tokens, sparsity 0.8: recall 0.973, not 0.968).
STRIDE = 8
QUERY_STEP = 10


def block_count(length: Size) -> Size:
    return (length + BLOCK - 1) // BLOCK


def pooled_blocks(call: AttentionCall, grid: TokenGrid, sparsity: Fraction) -> Tensor:
    """Rain fusion: scores of the mean query and the mean key of each pair of blocks."""
    query, key = _mean_of_blocks(call.query), _per_query_head(call, _mean_of_blocks(call.key))
    return _with_whole_rows(_highest(query @ key.transpose(2, 3) * call.scale, sparsity), grid)


def estimated_blocks(call: AttentionCall, grid: TokenGrid, sparsity: Fraction) -> Tensor:
    """Block-sparse: the softmax over samples along antidiagonals, summed over each pair of blocks.

    The first and the last key block are kept too, and the block on the diagonal.
    """
    kept = _highest(sampled_weights(call), sparsity)
    blocks = torch.arange(kept.size(-1), device=kept.device)
    ends = (blocks == 0) | (blocks == kept.size(-1) - 1)
    return _with_whole_rows(kept | ends | (blocks.unsqueeze(-1) == blocks), grid)


def sampled_weights(call: AttentionCall) -> Tensor:
    """(B, Hq, query blocks, key blocks): how much of the sampled softmax each pair of blocks has, in float32."""
    per_block = BLOCK // STRIDE
    query = _grouped(_grouped(call.query, BLOCK), STRIDE, 3)[:, :, :, ::QUERY_STEP] * (call.scale / STRIDE)
    key = _per_query_head(call, _grouped(call.key, STRIDE).flatten(3))
    scores = (query.flip(4).flatten(4).flatten(2, 3) @ key.transpose(2, 3)).float()
    if not known(call.key.size(2) % STRIDE == 0):
        real = torch.arange(scores.size(3), device=scores.device) * STRIDE < call.key.size(2)
        scores = scores.masked_fill(~real, -torch.inf)
    columns = block_count(call.key.size(2))
    weights = F.pad(scores.softmax(-1), (0, columns * per_block - scores.size(3)))
    of_columns = weights.unflatten(3, (columns, per_block)).sum(4)
    return of_columns.unflatten(2, (query.size(2), query.size(3))).sum(3)


def _grouped(x: Tensor, size: int, dim: int = 2) -> Tensor:
    """Rows in groups of `size`, zeros behind the last."""
    length = x.size(dim)
    count = (length + size - 1) // size
    if not known(length % size == 0):
        # A padding that turns out to be 0 keeps the strides, others do not: torch traces the latter.
        x = F.pad(x.contiguous(), (0, 0, 0, count * size - length))
    return x.unflatten(dim, (count, size))


def _mean_of_blocks(x: Tensor) -> Tensor:
    """(B, H, blocks, D) in float32; the last block may have fewer rows."""
    count, length = block_count(x.size(2)), x.size(2)
    if known(length % BLOCK == 0):
        return x.unflatten(2, (count, BLOCK)).mean(3, dtype=torch.float32)
    padded = F.pad(x, (0, 0, 0, count * BLOCK - length)).unflatten(2, (count, BLOCK))
    rows = (length - torch.arange(count, device=x.device) * BLOCK).clamp(max=BLOCK)
    return padded.sum(3, dtype=torch.float32) / rows.unsqueeze(-1)


def _per_query_head(call: AttentionCall, key: Tensor) -> Tensor:
    """Of keys by kv head, one of each query head; a view where every head has its own."""
    heads, kv_heads = call.query.size(1), call.key.size(1)
    return key if guard(heads == kv_heads) else key.repeat_interleave(heads // kv_heads, 1)


def _highest(scores: Tensor, sparsity: Fraction) -> Tensor:
    """Exactly ceil((1 - sparsity) n) of the n columns of each row."""
    kept = 1 - sparsity
    count = (scores.size(-1) * kept.numerator + kept.denominator - 1) // kept.denominator
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, -1).indices, True)


def _with_whole_rows(kept: Tensor, grid: TokenGrid) -> Tensor:
    """What is kept, and the rows and columns that are kept whole."""
    whole = whole_rows(grid, kept.size(-1), kept.device)
    return kept | whole | whole.unsqueeze(-1)


def whole_rows(grid: TokenGrid, count: Size, device: torch.device) -> Tensor:
    """Bool (count,): blocks that have a token of text, or of the first frame where there are several."""
    block = torch.arange(count, device=device)
    first: Size = grid.before
    if not guard(grid.frames == 1):
        first = first + grid.frame
    whole = block * BLOCK < first
    if not known(grid.after == 0):
        whole = whole | ((block + 1) * BLOCK > grid.before + grid.video)
    return whole
