"""The example of docs/paged.md runs, and becomes what the page says."""

from pathlib import Path

import torch
from packed_cases import formula
from page_code import code_blocks

import sgl_npu

PAGE = Path(__file__).parent.parent / "docs" / "paged.md"


def test_the_example_of_the_page():
    torch.manual_seed(0)
    torch._dynamo.reset()
    (code,) = code_blocks(PAGE)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    (site,) = sgl_npu.reports()[-1].sites
    assert (site.kernel, site.mask, site.fused) == ("ascend_packed", "causal (bottom-right)", True)
    layer, slots, table, hidden = (names[name] for name in ("layer", "slots", "block_table", "hidden"))
    caches = layer.key_cache, layer.value_cache
    for cache in caches:
        assert (cache.flatten(0, 1) != 0).flatten(1).any(1).nonzero().flatten().tolist() == sorted(slots.tolist())
    with torch.no_grad():
        query = layer.qkv(hidden).unflatten(-1, (-1, names["DIM"]))[:, : names["HEADS"]]
    lengths = [(1, 131), (3, 3)]
    key, value = (
        torch.cat([cache[row.long()].flatten(0, 1)[:keys] for row, (_, keys) in zip(table, lengths, strict=True)])
        for cache in caches
    )
    expected, _ = formula(query, key, value, lengths, causal=True)
    torch.testing.assert_close(names["out"].double(), expected, atol=2e-2, rtol=2e-2)
