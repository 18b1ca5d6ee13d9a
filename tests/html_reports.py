"""Reports that were never compiled, for what a page makes of them."""

from __future__ import annotations

from sgl_npu.compiler.report import GraphReport, Report, Site
from sgl_npu.compiler.trace import LayerCost, Raster, SiteTrace, Trace
from sgl_npu.lowering.sequence.schedule import Schedule, Step

OP = "npu.npu_fused_infer_attention_score"
RING = Schedule(
    "ring", 2, 1, False, 32, 32,
    (
        Step("send", "shift 1 of keys and values", 50_000_000, ("shift 1", "shift 1")),
        Step("compute", "its own keys", 400_000_000_000, ("k0", "k1")),
        Step("compute", "hop 1", 400_000_000_000, ("k1", ""), (0, 1)),
    ),
)  # fmt: skip


def site(number: int, module: str = "", **changes) -> Site:
    facts = {
        "spelling": "scaled_dot_product_attention", "source": "model.py:7", "op": OP, "kernel": "ascend_fa",
        "fused": True, "mask": "causal", "dtype": "bfloat16",
        "query": ("1", "8", "64", "16"), "key": ("1", "2", "64", "16"), "value": ("1", "2", "64", "16"),
    }  # fmt: skip
    return Site(number, module=module, **{**facts, **changes})


def trace(**changes) -> SiteTrace:
    facts = {"query": (1, 8, 64, 16), "key": (1, 2, 64, 16), "value": (1, 2, 64, 16), "upper": 0}
    return SiteTrace(**{**facts, **changes})


def report(sites: list[Site], traces: list[SiteTrace] | None = None, **changes) -> Report:
    found = None
    if traces is not None:
        cost = LayerCost(3, 3000, {(64, 64): (2, 2048)}), LayerCost(2, 1000)
        found = Trace(dict(enumerate(traces)), {"layers.0": cost[0]}, {"layers.0": cost[1]})
    facts = {"seconds": {"capture": 0.01, "match": 0.2, "passes": 0.3, "total": 1.0}}
    return Report("npu", "eager", sites, [GraphReport("inference", "return", 3)], trace=found, **{**facts, **changes})


def lines(number: int, count: int = 56) -> str:
    """A graph's text as long as they are, unlike that of other numbers."""
    first = "attention: bf16[1, 8, 64, 16] = sgl_npu.attention(view, view1, view2, scale=0.25, upper=0)"
    rest = (
        f"view{x}: bf16[1, 8, {number}, 64, 16] = aten.view(input{x}, [1, 8, {number}, 64, {x}], layer={number})"
        for x in range(count - 1)
    )
    return "\n".join([first, *rest])


def layers(count: int, alike: bool = True) -> Report:
    """A model of so many layers, alike but for the number in their names, or in nothing alike."""
    numbers = [0] * count if alike else list(range(count))
    rasters = [
        Raster("", "\n".join("".join("04"[(row * column + x) % 7 < 4] for column in range(96)) for row in range(96)))
        for x in numbers
    ]
    traces = [
        trace(before=lines(x), after=lines(x + 1000), mask_node="mask", mask_kept="b8[1, 1, 64, 64]", raster=raster)
        for x, raster in zip(numbers, rasters, strict=True)
    ]
    return report([site(x, f"model.layers.{x}.self_attn") for x in range(count)], traces)
