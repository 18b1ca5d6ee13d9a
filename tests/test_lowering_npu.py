"""Which Ascend call implements which attention, and that the emulated op agrees with the formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from compiled_report import ATTENTION, assert_same, compile_for, compiled, count, only_site
from hypothesis import given, settings
from hypothesis import strategies as st
from random_attention import MANY, Call, check_call, random_call

import sgl_npu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FIA, V3 = "npu.npu_fused_infer_attention_score", "npu.npu_fusion_attention_v3"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors(rows=40, keys=40, heads=4, kv_heads=2, dim=64, value_dim=None, dtype=BF16, batch=2):
    """Query, key and value as projections make them: (B, S, N, D) in memory."""
    shapes = ((rows, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim or dim))
    return [torch.randn((batch, *shape), dtype=dtype).transpose(1, 2) for shape in shapes]


def keep(*shape):
    return torch.rand(shape) > 0.3


def lowered(qkv, mask=None, bias=None, sinks=None, lse=False, dynamic=False, **band):
    """Compile one attention, hold it against float64, and return its site and the text of its graph."""
    call = Call([*qkv, mask, bias, sinks], {"scale": qkv[0].size(-1) ** -0.5, **band})
    check_call(call, "npu", lse, dynamic)
    report = sgl_npu.reports()[-1]
    return only_site([report]), report.graph


def argument(graph, name):
    """The value of a keyword argument of the Ascend op; None where it is left at its default."""
    line = next(line for line in graph.splitlines() if " = npu." in line)
    _, found, rest = line.partition(f" {name}=")
    return rest.partition(",")[0].rstrip(")") if found else None


# ---------------------------------------------------------------- bands

BANDS = {
    "no mask": ({}, {}, None, None, None),
    "top-left causal": ({}, {"upper": 0}, "2", None, None),
    "top-left causal, more keys": ({"keys": 70}, {"upper": 0}, "2", None, None),
    "top-left causal, fewer keys": ({"keys": 7}, {"upper": 0}, "2", None, None),
    "bottom-right causal": ({"keys": 70}, {"upper": 30}, "3", None, None),
    "window": ({}, {"lower": -5, "upper": 0}, "4", "5", "0"),
    "window over a cache": ({"keys": 70}, {"lower": 20, "upper": 30}, "4", "10", "0"),
    "symmetric window": ({}, {"lower": -5, "upper": 5}, "4", "5", "5"),
    "left side alone": ({}, {"lower": -5}, "4", "5", None),
    "right side alone": ({}, {"upper": 5}, "4", None, "5"),
    "strictly causal": ({}, {"upper": -1}, "4", None, "-1"),
    "a side that excludes nothing": ({}, {"lower": -39, "upper": 39}, None, None, None),
    "bottom-right with more rows than keys": ({"keys": 7}, {"upper": -33}, "3", None, None),
}


@pytest.mark.parametrize("lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("case", BANDS)
def test_a_band_becomes_a_sparse_mode_and_no_dense_mask(case, dtype, lse):
    sizes, band, mode, before, after = BANDS[case]
    site, graph = lowered(tensors(**sizes, dtype=dtype), lse=lse, **band)
    assert (site.kernel, site.op, site.refusals) == ("ascend_fa", FIA, [])
    assert [argument(graph, name) for name in ("sparse_mode", "pre_tokens", "next_tokens")] == [mode, before, after]
    assert argument(graph, "input_layout") == "BSND"
    assert argument(graph, "softmax_lse_flag") == (str(lse) if lse else None)
    assert "[2048, 2048]" in graph or mode is None
    assert "aten.bitwise_not" not in graph


@pytest.mark.parametrize(
    "case, row_fix",
    [
        ("top-left causal", None),
        ("window over a cache", None),
        ("strictly causal", "2"),
        ("bottom-right with more rows than keys", "2"),
    ],
)
def test_the_row_fix_is_asked_for_where_a_row_may_be_empty_and_nowhere_else(case, row_fix):
    sizes, band, *_ = BANDS[case]
    _, graph = lowered(tensors(**sizes), **band)
    assert argument(graph, "inner_precise") == row_fix


@pytest.mark.parametrize(
    "sizes, band",
    [
        ({}, {"lower": 3, "upper": 2}),
        ({}, {"upper": -40}),
        ({}, {"lower": 40}),
        ({"rows": 5, "keys": 3}, {"lower": 4, "upper": 9}),
    ],
)
def test_a_band_that_keeps_nothing_gives_zeros_and_minus_infinity(sizes, band):
    site, _ = lowered(tensors(**sizes), lse=True, **band)
    assert site.fused


# ---------------------------------------------------------------- masks and biases

DENSE = {
    "(Skv,)": (40,),
    "(1, Skv)": (1, 40),
    "(Sq, 1)": (40, 1),
    "(Sq, Skv)": (40, 40),
    "(1, 1, Skv)": (1, 1, 40),
    "(1, 1, Sq, Skv)": (1, 1, 40, 40),
    "(B, 1, 1, Skv)": (2, 1, 1, 40),
    "(B, 1, Sq, 1)": (2, 1, 40, 1),
    "(B, 1, Sq, Skv)": (2, 1, 40, 40),
    "(1, 1, 1, 1)": (1, 1, 1, 1),
}


@pytest.mark.parametrize("band", [{}, {"upper": 0}], ids=["alone", "with a band"])
@pytest.mark.parametrize("shape", DENSE)
def test_a_mask_of_any_shape_becomes_one_dense_mask_inverted_once(shape, band):
    mask = keep(*DENSE[shape])
    site, graph = lowered(tensors(), mask, lse=True, **band)
    assert site.kernel == "ascend_fa"
    assert argument(graph, "sparse_mode") is None and argument(graph, "inner_precise") == "2"
    assert graph.count("aten.bitwise_not") == 1


@pytest.mark.parametrize("shape", [(1, 4, 40, 40), (2, 4, 40, 40), (4, 1, 40), (2, 4, 1, 40), (4, 40, 1)])
def test_a_mask_per_head_goes_to_the_training_op(shape):
    site, _ = lowered(tensors(), keep(*shape), lse=True)
    assert (site.kernel, site.op) == ("ascend_fusion_attention", V3)
    assert site.refusals[0] == ("ascend_fa", "atten_mask has a head axis of 4; per-head masks are not supported")


@pytest.mark.parametrize("band", [{}, {"upper": 0}, {"lower": -3, "upper": 0}], ids=["alone", "causal", "window"])
@pytest.mark.parametrize("shape", [(40, 40), (4, 40, 40), (1, 4, 1, 40), (2, 1, 1, 40), (1,), (2, 4, 40, 40)])
def test_a_bias_becomes_a_pse_shift_over_all_heads_in_the_dtype_of_the_query(shape, band):
    bias = torch.randn(shape).to(BF16)
    bias = bias.masked_fill(torch.rand(shape) > 0.9, -math.inf) if bias.numel() > 1 else bias
    site, graph = lowered(tensors(), bias=bias, lse=True, **band)
    assert site.kernel == "ascend_fa"
    batch = shape[0] if len(shape) == 4 else 1
    name = argument(graph, "pse_shift")
    assert f"{name}: bf16[{batch}, 4, 40, 40]" in graph


def test_a_bias_that_is_more_precise_than_the_query_is_not_rounded_for_the_kernel():
    site, _ = lowered(tensors(), bias=torch.randn(40, 40))
    assert site.kernel == "reference"
    assert site.refusals[0] == ("ascend_fa", "pse_shift is float32 but query is bfloat16; they must agree")


def test_mask_bias_and_band_together_are_one_call():
    site, graph = lowered(tensors(), keep(2, 1, 1, 40), torch.randn(40, 40, dtype=BF16), lse=True, upper=0)
    assert site.kernel == "ascend_fa" and graph.count(" = npu.") == 1


# ---------------------------------------------------------------- sizes and dtypes


@pytest.mark.parametrize(
    "sizes, kernel, clause",
    [
        ({"dim": 72}, "ascend_fa_padded", "D = 72 is not a multiple of 16"),
        ({"dim": 72, "value_dim": 40}, "ascend_fa_padded", "they must agree"),
        ({"dim": 64, "value_dim": 128}, "ascend_fa_padded", "they must agree"),
        ({"dim": 576}, "ascend_fusion_attention", "D = 576 is not in 1..512"),
        ({"heads": 130, "kv_heads": 2, "dim": 16}, "ascend_fusion_attention", "N/Nk = 65 exceeds 64"),
        ({"heads": 300, "kv_heads": 300, "dim": 16}, "reference", "exceed 256"),
        ({"dtype": FP32}, "ascend_fusion_attention", "query is float32; the kernel takes float16 and bfloat16"),
        ({"dtype": torch.float64}, "reference", "query is float64"),
    ],
)
def test_a_limit_of_the_kernel_sends_the_call_on_with_its_clause(sizes, kernel, clause):
    site, _ = lowered(tensors(rows=6, keys=9, **sizes), lse=True, upper=3)
    assert site.kernel == kernel
    assert clause in site.refusals[0][1]
    assert site.refusals[0][0] == "ascend_fa"


def test_512_has_no_lse_there():
    assert lowered(tensors(rows=6, keys=9, dim=512))[0].kernel == "ascend_fa"
    site, _ = lowered(tensors(rows=6, keys=9, dim=512), lse=True)
    assert site.kernel == "ascend_fusion_attention"


@pytest.mark.parametrize("rows, keys, batch", [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 1)])
def test_nothing_to_attend_is_not_given_to_a_kernel(rows, keys, batch):
    site, _ = lowered(tensors(rows=rows, keys=keys, batch=batch), lse=True)
    assert site.kernel == "reference"
    assert ("ascend_fa", "an empty batch, query or key") in site.refusals


def test_a_softcap_goes_to_the_reference_with_the_sentence():
    site, _ = lowered(tensors(), softcap=5.0)
    assert (site.kernel, site.fused) == ("reference", False)
    assert site.refusals[0] == ("ascend_fa", "softcap = 5.0: the kernel has no softcap")


# ---------------------------------------------------------------- sinks


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "band, mode", [({}, None), ({"upper": 0}, "3"), ({"lower": -5, "upper": 0}, "4")], ids=["full", "causal", "window"]
)
def test_sinks_go_to_version_2_packed(dim, band, mode):
    site, graph = lowered(tensors(dim=dim), sinks=torch.randn(4, dtype=BF16), **band)
    assert (site.kernel, site.op) == ("ascend_fa_sink", f"{FIA}_v2")
    assert site.refusals == [("ascend_fa", "sinks: version 1 of the kernel has none")]
    assert argument(graph, "sparse_mode") == mode and argument(graph, "input_layout") == "TND"


@pytest.mark.parametrize(
    "arguments, clause",
    [
        ({"dim": 32}, "(D, Dv) = (32, 32) in layout TND"),
        ({"dtype": FP16}, "query is float16 in layout TND"),
        ({"sinks_dtype": FP32}, "learnable_sink is float32"),
        ({"lse": True}, "the lse is used"),
        ({"mask": (2, 1, 1, 40)}, "may be left without a key"),
        ({"bias": (40, 40)}, "may be left without a key"),
        ({"upper": -1}, "may be left without a key"),
        ({"keys": 50, "upper": 0}, "sparse_mode = 2 in layout TND"),
    ],
)
def test_other_sinks_join_through_the_lse(arguments, clause):
    arguments = dict(arguments)
    sinks = torch.randn(4, dtype=arguments.pop("sinks_dtype", BF16))
    mask = keep(*arguments.pop("mask")) if "mask" in arguments else None
    bias = torch.randn(arguments.pop("bias"), dtype=BF16) if "bias" in arguments else None
    band = {name: arguments.pop(name) for name in ("upper", "lse") if name in arguments}
    site, graph = lowered(tensors(**arguments), mask, bias, sinks, **band)
    assert site.kernel == "ascend_fa_lse_sink"
    assert site.refusals[1][0] == "ascend_fa_sink" and clause in site.refusals[1][1]
    assert argument(graph, "softmax_lse_flag") == "True"


@pytest.mark.parametrize("sizes", [{"dim": 72}, {"dtype": FP32}], ids=["padded", "float32"])
def test_sinks_join_every_other_kernel_too(sizes):
    assert lowered(tensors(**sizes), sinks=torch.randn(4), lse=True, upper=0)[0].fused


# ---------------------------------------------------------------- one query row

DECODE = {
    "full": {},
    "bottom-right causal": {"upper": 29},
    "top-left causal sees key 0 alone": {"upper": 0},
    "window": {"lower": 20, "upper": 29},
    "window from the top left": {"lower": -3, "upper": 0},
    "nothing left": {"lower": 5, "upper": 4},
}


@pytest.mark.parametrize("lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("case", DECODE)
def test_one_query_row_gets_a_dense_mask_where_the_band_cuts_keys(case, lse):
    site, graph = lowered(tensors(rows=1, keys=30), lse=lse, **DECODE[case])
    assert site.kernel == "ascend_fa"
    assert argument(graph, "sparse_mode") is None and argument(graph, "inner_precise") is None
    assert (argument(graph, "atten_mask") is None) == (case in ("full", "bottom-right causal"))


@pytest.mark.parametrize("shape", [(30,), (1, 30), (2, 1, 1, 30), (1, 1, 1, 30), (2, 4, 1, 30)])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_a_masked_query_row_is_exact_even_without_any_key(shape, kind):
    kept = keep(*shape)
    kept[..., :] &= torch.arange(kept.numel()).view(kept.shape) >= kept.numel() / 2  # the first rows are empty
    bias = torch.zeros(shape, dtype=BF16).masked_fill(~kept, -math.inf)
    arguments = {"mask": kept} if kind == "mask" else {"bias": bias}
    assert lowered(tensors(rows=1, keys=30), **arguments, lse=True)[0].fused


@pytest.mark.parametrize("rows", [1, 6])
def test_rows_that_mask_and_bias_empty_together_are_exact(rows):
    mask = torch.arange(8) < 4
    bias = torch.zeros(rows, 8, dtype=BF16).masked_fill(mask, -math.inf)
    lowered(tensors(rows=rows, keys=8), mask, bias, lse=True)


def test_is_causal_with_one_row_and_many_keys_sees_the_first_key_alone():
    q, k, v = tensors(rows=1, keys=9)

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    compiled(attention, q, k, v)
    with torch.no_grad():
        got = compile_for(attention)(q, k, v)
    torch.testing.assert_close(got, v[:, :, :1].repeat_interleave(2, 1))


# ---------------------------------------------------------------- strides


@pytest.mark.parametrize(
    "orders, layout, copies",
    [
        (("BSND", "BSND", "BSND"), "BSND", 0),
        (("BNSD", "BNSD", "BNSD"), "BNSD", 0),
        (("BSND", "BNSD", "BNSD"), "BNSD_BSND", 1),
        (("BNSD", "BSND", "BSND"), "BSND_BNSD", 1),
        (("BNDS", "BSND", "BSND"), "BSND_BNSD", 1),
    ],
)
def test_the_layout_is_the_one_that_copies_least(orders, layout, copies):
    qkv = [
        x if order == "BSND" else x.contiguous() if order == "BNSD" else x.mT.contiguous().mT
        for x, order in zip(tensors(), orders, strict=True)
    ]
    _, graph = lowered(qkv, upper=0)
    assert argument(graph, "input_layout") == layout
    inputs = graph.partition(" = npu.")[0]
    assert inputs.count("aten.clone") == copies


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_value_that_needs_no_padding_is_still_made_contiguous(dynamic):
    q, k, v = tensors(rows=5, keys=33, heads=3, kv_heads=3, dim=24, value_dim=32)
    site, _ = lowered([q, k, v.mT.contiguous().mT], upper=0, dynamic=dynamic)
    assert site.kernel == "ascend_fa_padded"


# ---------------------------------------------------------------- symbolic sizes


def run_all(attention, inputs, dims, graphs):
    """Call with every set of inputs, `dims` of each dynamic, in at most that many graphs."""
    run, before = compile_for(attention), len(sgl_npu.reports())
    for tensors in inputs:
        for x, marked in zip(tensors, dims, strict=True):
            torch._dynamo.mark_dynamic(x, marked)
        with torch.no_grad():
            assert_same(run(*tensors), attention(*tensors))
    assert len(sgl_npu.reports()) == before + graphs
    return sgl_npu.reports()[-1]


SYMBOLIC = {
    "full": lambda q, k: {},
    "causal": lambda q, k: {"upper": 0},
    "bottom-right": lambda q, k: {"upper": k.size(2) - q.size(2)},
    "window over a cache": lambda q, k: {"lower": k.size(2) - q.size(2) - 3, "upper": k.size(2) - q.size(2)},
    "window from the top left": lambda q, k: {"lower": -3, "upper": 0},
    "a side in keys": lambda q, k: {"upper": k.size(2) // 2},
}


@pytest.mark.parametrize("band", SYMBOLIC)
def test_one_graph_serves_all_lengths_and_batches(band):
    def attention(q, k, v):
        return ATTENTION(q, k, v, scale=0.125, **SYMBOLIC[band](q, k))

    sizes = ((2, 5, 9), (3, 7, 31), (5, 33, 64), (4, 2, 3))
    inputs = [tensors(rows, keys, batch=batch) for batch, rows, keys in sizes]
    report = run_all(attention, inputs, [(0, 2)] * 3, graphs=1)
    assert report.sites[0].kernel == "ascend_fa"
    if band in ("causal", "bottom-right", "window over a cache"):
        assert argument(report.graph, "sparse_mode") in ("2", "3", "4")


def test_more_rows_than_keys_after_fewer_is_another_graph_with_the_right_empty_rows():
    def attention(q, k, v):
        return ATTENTION(q, k, v, scale=0.125, upper=k.size(2) - q.size(2))

    report = run_all(attention, [tensors(5, 9), tensors(6, 40), tensors(9, 5)], [2, 2, 2], graphs=2)
    assert argument(report.graph, "inner_precise") == "2"


def test_one_query_row_after_many_is_another_graph():
    def attention(q, k, v):
        return ATTENTION(q, k, v, scale=0.125, upper=0)

    run = compile_for(attention, dynamic=True)
    for rows in (5, 1, 8):
        q, k, v = tensors(rows, 12)
        assert_same(run(q, k, v), attention(q, k, v))


def test_a_symbolic_padding_mask_keeps_one_graph():
    def attention(q, k, v, mask):
        return ATTENTION(q, k, v, mask, scale=0.125, upper=0)

    inputs = [(*tensors(n, n, batch=b), keep(b, 1, 1, n)) for b, n in ((2, 5), (3, 17), (4, 6))]
    run_all(attention, inputs, [(0, 2), (0, 2), (0, 2), (0, 3)], graphs=1)


def test_symbolic_head_counts_are_specialised_by_guard():
    def attention(q, k, v):
        return ATTENTION(q, k, v, scale=0.125)

    run, before = compile_for(attention, dynamic=True), len(sgl_npu.reports())
    for heads in (4, 8, 6):
        q, k, v = tensors(heads=heads, rows=11, keys=13, batch=3)
        assert_same(run(q, k, v), attention(q, k, v))
        assert argument(sgl_npu.reports()[-1].graph, "num_heads") == str(heads)
    assert len(sgl_npu.reports()) == before + 3


# ---------------------------------------------------------------- several sites


def test_sites_share_one_mask_and_one_triangle():
    def attention(q, k, v, mask):
        first = ATTENTION(q, k, v, mask, scale=0.125)[0]
        second = ATTENTION(q, first[:, :2], v, mask, scale=0.125)[0]
        third = ATTENTION(q, k, first[:, 2:], scale=0.125, upper=0)[0]
        return first, second, third, ATTENTION(second, k, v, scale=0.125, upper=0)[0]

    report = compiled(attention, *tensors(), keep(2, 1, 1, 40))[0]
    assert count(report, "aten.bitwise_not") == count(report, "aten.triu") == 1
    assert count(report, "npu.npu_fused_infer_attention_score") == 4


# ---------------------------------------------------------------- anything


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2**20), st.booleans(), st.booleans())
def test_random_calls_agree_with_float64(seed, lse_used, dynamic):
    check_call(random_call(seed), "npu", lse_used, dynamic)


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, derandomize=True)
@given(st.integers(2**20, 2**21), st.booleans(), st.booleans())
def test_many_random_calls_agree_with_float64(seed, lse_used, dynamic):
    check_call(random_call(seed), "npu", lse_used, dynamic)
