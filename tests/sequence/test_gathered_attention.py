"""Local queries over keys that every rank has: no communication, so one process can be every rank in turn."""

import pytest
import torch

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sequence import gathered_attention
from sgl_npu.runtime.attention import reference_attention
from sgl_npu.runtime.sequence import SequenceLayout


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("length", [40, 43, 3])
@pytest.mark.parametrize("blocks, ulysses", [(4, 1), (2, 2), (1, 4), (2, 3)])
def test_every_rank_of_every_grid_has_the_causal_rows_of_the_whole(blocks, ulysses, length, zigzag):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 16) for heads in (4, 2, 2))
    expected, _ = reference_attention(query, key, value, scale=0.25, upper=0)
    layout = SequenceLayout((length,), blocks, ulysses, zigzag)
    for block in range(blocks):
        for piece in range(ulysses):
            ranks = torch.tensor([block, piece])
            rows = layout.positions(ranks)
            call = AttentionCall(query[:, :, rows], key, value, scale=0.25, upper=0, inner="eager")
            out, _ = gathered_attention(call, layout, ranks)
            real = layout.raw_positions(ranks) < length
            torch.testing.assert_close(out[:, :, real], expected[:, :, rows][:, :, real])
