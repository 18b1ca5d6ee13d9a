"""Which CPU kernel implements which attention; values, lse and gradients against the formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from compiled_report import ATTENTION, assert_same, compile_for, compiled, count, only_site
from hypothesis import given, settings
from hypothesis import strategies as st
from random_attention import MANY, Call, check_call, random_call

import sgl_npu
from sgl_npu.runtime.attention import reference_attention

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors(rows=40, keys=40, heads=4, kv_heads=2, dim=16, value_dim=None, dtype=FP32, batch=2):
    shapes = ((rows, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim or dim))
    return [torch.randn((batch, *shape), dtype=dtype).transpose(1, 2) for shape in shapes]


def keep(*shape):
    return torch.rand(shape) > 0.3


def lowered(qkv, mask=None, bias=None, sinks=None, lse=True, dynamic=False, **settings):
    call = Call([*qkv, mask, bias, sinks], {"scale": qkv[0].size(-1) ** -0.5, **settings})
    check_call(call, "cpu", lse, dynamic)
    report = sgl_npu.reports()[-1]
    return only_site([report]), report


# ---------------------------------------------------------------- which kernel

KERNELS = {
    "no mask": ({}, {}, "flash_cpu"),
    "top-left causal": ({"keys": 70}, {"upper": 0}, "flash_cpu"),
    "more rows than keys, top-left": ({"keys": 7}, {"upper": 0}, "flash_cpu"),
    "a side that excludes nothing": ({}, {"lower": -39, "upper": 39}, "flash_cpu"),
    "bottom-right causal": ({"keys": 70}, {"upper": 30}, "flash_cpu_bottom_right"),
    "one column short of all": ({}, {"upper": 38}, "flash_cpu_bottom_right"),
    "strictly causal": ({}, {"upper": -1}, "flash_cpu_masked"),
    "bottom-right with more rows than keys": ({"keys": 7}, {"upper": -33}, "flash_cpu_masked"),
    "window": ({}, {"lower": -5, "upper": 0}, "flash_cpu_masked"),
    "a band that keeps nothing": ({}, {"lower": 3, "upper": 2}, "flash_cpu_masked"),
    "softcap": ({}, {"softcap": 5.0}, "reference"),
    "Dv > D": ({"value_dim": 24}, {"upper": 0}, "flash_cpu"),
    "Dv < D": ({"value_dim": 8}, {"upper": 0}, "flash_cpu"),
    "no query": ({"rows": 0}, {}, "reference"),
    "no key": ({"keys": 0}, {}, "reference"),
    "no batch": ({"batch": 0}, {}, "reference"),
}


@pytest.mark.parametrize("dtype", [FP32, torch.float64, BF16, torch.float16])
@pytest.mark.parametrize("case", KERNELS)
def test_a_band_goes_to_the_cheapest_kernel_that_says_it(case, dtype):
    sizes, band, kernel = KERNELS[case]
    site, report = lowered(tensors(**sizes, dtype=dtype), **band)
    assert site.kernel == kernel
    assert count(report, FLASH) == {"reference": 0, "flash_cpu_bottom_right": 2}.get(kernel, 1)


MASKS = [(40,), (40, 1), (40, 40), (1, 1, 40), (2, 1, 1, 40), (2, 4, 40, 40), (4, 1, 40), (1, 4, 40, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("band", [{}, {"upper": 0}, {"lower": -5, "upper": 0}], ids=["alone", "causal", "window"])
@pytest.mark.parametrize("shape", MASKS)
def test_a_mask_of_any_shape_leaves_empty_rows_at_zero_and_minus_infinity(shape, band):
    mask = keep(*shape)
    mask.view(-1)[: mask.numel() // 2] = False
    site, report = lowered(tensors(), mask, **band)
    assert site.kernel == ("flash_cpu_masked" if "lower" in band else "flash_cpu")
    if band == {"upper": 0}:
        assert ", True, attn_mask=" in report.graph


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize(
    "dtype, bias_dtype", [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16), (torch.float64, FP32)]
)
def test_a_bias_of_any_shape_and_dtype_is_added(shape, dtype, bias_dtype):
    bias = torch.randn(shape).to(bias_dtype).masked_fill(torch.rand(shape) > 0.8, -math.inf)
    assert lowered(tensors(dtype=dtype), bias=bias, upper=0)[0].kernel == "flash_cpu"


def test_mask_bias_and_band_together_are_one_call():
    site, report = lowered(tensors(), keep(2, 1, 1, 40), torch.randn(4, 40, 40), upper=0)
    assert site.kernel == "flash_cpu" and count(report, FLASH) == 1


@pytest.mark.parametrize(
    "sizes, band",
    [({}, {"upper": 0}), ({"keys": 70}, {"upper": 30}), ({}, {"lower": -5, "upper": 0}), ({}, {"upper": -3})],
)
@pytest.mark.parametrize("lse", [False, True])
def test_sinks_join_every_kernel(sizes, band, lse):
    assert lowered(tensors(**sizes), sinks=torch.randn(4), lse=lse, **band)[0].fused


@pytest.mark.parametrize("which", [0, 1, 2])
def test_rows_that_are_not_contiguous_are_copied_first(which):
    qkv = tensors()
    qkv[which] = qkv[which].mT.contiguous().mT
    assert lowered(qkv, upper=0)[0].kernel == "flash_cpu"


# ---------------------------------------------------------------- symbolic sizes


@pytest.mark.parametrize("kernel, upper", [("flash_cpu", None), ("flash_cpu", 0), ("flash_cpu_bottom_right", "end")])
def test_one_graph_serves_all_lengths_and_batches(kernel, upper):
    def attention(q, k, v):
        return ATTENTION(q, k, v, scale=0.25, upper=k.size(2) - q.size(2) if upper == "end" else upper)

    run, before = compile_for(attention, "cpu"), len(sgl_npu.reports())
    for batch, rows, keys in ((2, 5, 9), (3, 7, 31), (5, 33, 64)):
        inputs = tensors(rows, keys, batch=batch)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, (0, 2))
        assert_same(run(*inputs), attention(*inputs))
    assert len(sgl_npu.reports()) == before + 1
    assert sgl_npu.reports()[-1].sites[0].kernel == kernel


def test_lengths_that_cross_the_diagonal_are_another_graph():
    def attention(q, k, v):
        return ATTENTION(q, k, v, scale=0.25, upper=k.size(2) - q.size(2))

    run = compile_for(attention, "cpu", dynamic=True)
    for rows, keys in ((5, 9), (9, 5), (6, 6), (1, 9), (3, 4)):
        inputs = tensors(rows, keys)
        assert_same(run(*inputs), attention(*inputs))


# ---------------------------------------------------------------- FlexAttention

needs_avx2 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="FlexAttention on CPU needs AVX2")


def flex(*tensors, dynamic=None, after=lambda x: x, **settings):
    def attention(*tensors):
        return after(ATTENTION(*tensors, scale=0.25, **settings)[0])

    return only_site(compiled(attention, *tensors, platform="cpu", inner="inductor", dynamic=dynamic))


@needs_avx2
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "sizes, settings",
    [
        ({"rows": 300, "keys": 300}, {"lower": -150, "upper": 0}),
        ({"rows": 130, "keys": 300}, {"lower": 100, "upper": 170}),
        ({"rows": 300, "keys": 130}, {"lower": -200, "upper": -129}),
        ({"rows": 140, "keys": 140}, {"lower": 139, "upper": 200}),
        ({"rows": 1, "keys": 300}, {"lower": 250}),
        ({"rows": 140, "keys": 140}, {"softcap": 5.0}),
        ({"rows": 140, "keys": 140}, {"softcap": 5.0, "upper": 0, "lower": -7}),
        ({"rows": 20, "keys": 20, "value_dim": 32}, {"lower": -7, "upper": 3}),
    ],
)
def test_windows_and_softcap_go_to_flex(sizes, settings, dtype):
    site = flex(*tensors(**sizes, dtype=dtype), **settings)
    assert (site.kernel, site.op) == ("flex", "flex_attention")


@needs_avx2
@pytest.mark.slow
def test_pointwise_ops_may_follow_flex():
    site = flex(*tensors(), lower=-7, upper=0, after=lambda x: F.gelu(x.transpose(1, 2).flatten(2) * 2 + 1))
    assert site.kernel == "flex"


@needs_avx2
@pytest.mark.slow
def test_flex_takes_symbolic_lengths():
    def attention(q, k, v):
        return ATTENTION(q, k, v, scale=0.25, lower=-7, upper=0)[0]

    run, before = compile_for(attention, "cpu", "inductor"), len(sgl_npu.reports())
    for rows, keys in ((150, 160), (300, 270), (200, 131)):
        inputs = tensors(rows, keys)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 2)
        with torch.no_grad():
            assert_same(run(*inputs), attention(*inputs))
    assert [report.sites[0].kernel for report in sgl_npu.reports()[before:]] == ["flex"]


@pytest.mark.parametrize(
    "arguments, clause",
    [
        ({"lse": True}, "sinks or a used lse"),
        ({"mask": (40, 40)}, "a mask tensor is left beside the band"),
        ({"dtype": torch.float64}, "query is float64"),
    ],
)
def test_flex_says_why_not(arguments, clause):
    arguments = dict(arguments)
    mask = keep(*arguments.pop("mask")) if "mask" in arguments else None
    lse = arguments.pop("lse", False)

    def attention(q, k, v):
        out = ATTENTION(q, k, v, mask, scale=0.25, lower=-7, upper=0)
        return out if lse else out[0]

    site = only_site(compiled(attention, *tensors(**arguments), platform="cpu", inner="inductor"))
    assert site.kernel == "flash_cpu_masked"
    assert clause in dict(site.refusals)["flex"]


# ---------------------------------------------------------------- gradients

BACKWARD = {
    "no mask": ({}, {}, FLASH),
    "top-left causal": ({"keys": 50}, {"upper": 0}, FLASH),
    "causal beside padding": ({}, {"upper": 0, "mask": (2, 1, 1, 40)}, FLASH),
    "a mask that empties rows": ({}, {"mask": (40, 1)}, FLASH),
    "a constant bias": ({}, {"bias": (40, 40)}, FLASH),
    "bottom-right causal": ({"keys": 50}, {"upper": 10}, "reference"),
    "window": ({}, {"lower": -5, "upper": 0}, "reference"),
    "softcap": ({}, {"softcap": 5.0}, "reference"),
    "a bias that wants its gradient": ({}, {"bias_grad": (4, 40, 40)}, "reference"),
    "sinks": ({}, {"sinks": True, "upper": 0}, "reference"),
    "a gradient of lse": ({}, {"lse": True, "upper": 0}, "reference"),
    "Dv > D": ({"value_dim": 24}, {"upper": 0}, "reference"),
    "Dv < D": ({"value_dim": 8}, {"upper": 0}, "reference"),
}


@pytest.mark.parametrize("order", ["BSND", "BNDS"])
@pytest.mark.parametrize("case", BACKWARD)
def test_gradients_are_those_of_the_formula(case, order):
    sizes, options, backward = BACKWARD[case]
    options = dict(options)
    qkv = tensors(**sizes) if order == "BSND" else [x.mT.contiguous().mT for x in tensors(**sizes)]
    mask = keep(*options.pop("mask")) if "mask" in options else None
    bias = torch.randn(options.pop("bias")) if "bias" in options else None
    if "bias_grad" in options:
        bias = torch.randn(options.pop("bias_grad")).requires_grad_()
    sinks = torch.randn(4).requires_grad_() if options.pop("sinks", False) else None
    with_lse = options.pop("lse", False)

    def loss(attention, *tensors):
        out, lse = attention(*tensors, scale=0.25, **options)
        weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
        total = (out * weights).sum()
        return total + lse.sin().sum() if with_lse else total

    inputs = [*(x.detach().requires_grad_() for x in qkv), mask, bias, sinks]
    exact = [
        x if x is None or x.dtype == torch.bool else x.detach().double().requires_grad_(x.requires_grad) for x in inputs
    ]
    compile_for(lambda *t: loss(ATTENTION, *t), "cpu")(*inputs).backward()
    loss(reference_attention, *exact).backward()
    for x, wanted in zip(inputs, exact, strict=True):
        if x is not None and x.requires_grad:
            torch.testing.assert_close(x.grad.double(), wanted.grad, atol=2e-5, rtol=2e-4)
    graph = sgl_npu.reports()[-1].graphs[-1]
    assert graph.kind == "backward"
    assert (f"{FLASH}_backward(" in graph.text) == (backward == FLASH)


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"keys": 0}, {"batch": 0}])
def test_gradients_of_nothing_are_zero(sizes):
    inputs = [x.detach().requires_grad_() for x in tensors(**sizes)]
    compile_for(lambda *t: ATTENTION(*t, scale=0.25)[0].sum(), "cpu")(*inputs).backward()
    assert all(not x.grad.any() for x in inputs)


def test_attentions_recomputed_in_the_backward_graph_have_the_gradients_of_eager():
    q, k, v = (x.detach().requires_grad_() for x in tensors())

    def layer(x):
        return x + ATTENTION(x, k, v, scale=0.25, softcap=5.0, lower=-7, upper=0)[0].sin()

    def model(x):
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return layer(x)

    grads = []
    for run in (compile_for(model, "cpu"), model):
        run(q).square().sum().backward()
        grads.append([x.grad.clone() for x in (q, k, v)])
        for x in (q, k, v):
            x.grad = None
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------- anything


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2**20), st.booleans(), st.booleans())
def test_random_calls_agree_with_float64(seed, lse_used, dynamic):
    check_call(random_call(seed), "cpu", lse_used, dynamic)


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, derandomize=True)
@given(st.integers(2**20, 2**21), st.booleans(), st.booleans())
def test_many_random_calls_agree_with_float64(seed, lse_used, dynamic):
    check_call(random_call(seed), "cpu", lse_used, dynamic)


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_a_scale_that_is_not_positive_is_kept_from_the_flash_kernel(scale):
    q, v = torch.randn(2, 1, 2, 16, 16)
    k = torch.randn(1, 2, 16, 16).transpose(2, 3)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v):
        return sdpa(q, k, v, is_causal=True, scale=scale)

    got = torch.compile(attend, backend="sgl_npu", options={"inner": "eager"})(q, k, v)
    torch.testing.assert_close(got, attend(q, k, v), atol=1e-5, rtol=1e-5)
