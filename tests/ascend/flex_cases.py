"""FlexAttention on an NPU, for both of Ascend's compilers: what eager gives on the CPU, for several lengths."""

from __future__ import annotations

import torch
from hand_over_cases import compiled, rand, to_npu
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sgl_npu
from sgl_npu.compiler.report import Report


def _score(score, b, h, i, j):
    return torch.where(i - j < 30, score * 0.5, -float("inf"))


def windows(x, ids):
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, x.size(2), x.size(2), device=x.device)
    return flex_attention(x, x[:, :2] + 1, x[:, 2:] * 2, _score, block_mask, enable_gqa=True)


def documents(x, ids):
    def same(b, h, i, j):
        return (ids[b, i] == ids[b, j]) & (i >= j)

    block_mask = create_block_mask(same, x.size(0), None, x.size(2), x.size(2), device=x.device)
    return flex_attention(x, x[:, :2] + 1, x[:, 2:] * 2, block_mask=block_mask, enable_gqa=True)


CASES = {
    "window": (windows, "ascend_fa", "band(-29, 0)"),
    "documents": (documents, "ascend_packed", "causal & documents"),
}


def check(case: str, options: dict) -> Report:
    """One graph for all lengths of more than one block; the report of it."""
    function, kernel, mask = CASES[case]
    on_device, before = compiled(function, options, dynamic=True), len(sgl_npu.reports())
    for length in (300, 200, 390):
        args = rand(1, 4, length, 64), (torch.arange(length) // 70)[None]
        with torch.no_grad():
            torch.testing.assert_close(on_device(*to_npu(args)).cpu(), function(*args), atol=3e-2, rtol=3e-2)
    (report,) = sgl_npu.reports()[before:]
    (site,) = report.sites
    assert (site.spelling, site.kernel, site.mask) == ("flex_attention", kernel, mask), site.refusals
    return report
