"""The example of docs/dflash.md runs, and becomes what the page says."""

from pathlib import Path

import torch
from packed_cases import formula
from page_code import code_blocks

import sgl_npu

PAGE = Path(__file__).parents[2] / "docs" / "dflash.md"


def test_the_example_of_the_page():
    torch.manual_seed(0)
    torch._dynamo.reset()
    (code,) = code_blocks(PAGE)
    names, before = {}, len(sgl_npu.reports())
    exec(compile(code, str(PAGE), "exec"), names)
    sites = [site for report in sgl_npu.reports()[before:] for site in report.sites]
    assert [(site.kernel, site.mask) for site in sites] == [
        ("ascend_packed", "full"),
        ("ascend_packed", "causal (bottom-right)"),
    ]
    keys, draft = names["keys"], names["DRAFT"]
    key, value = (
        torch.cat([cache[row.long()].flatten(0, 1)[:count] for row, count in zip(names["table"], keys, strict=True)])
        for cache in names["caches"]
    )
    for found, causal in (("drafted", False), ("verified", True)):
        expected, _ = formula(names["query"], key, value, [(draft, count) for count in keys], causal=causal)
        torch.testing.assert_close(names[found].double(), expected, atol=2e-2, rtol=2e-2)
