# ruff: noqa: E501
"""The final graphs, to the last node. Regenerate with EXPECTTEST_ACCEPT=1, then read what changed."""

import pytest
import torch
import torch.nn.functional as F
from compiled_report import ATTENTION, compiled, count, only_site
from expecttest import assert_expected_inline

B, S, N, D = 2, 64, 4, 32
CACHED = 10
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


def projected(rows=S, keys=S, kv_heads=N):
    """What the projections give: query, key and value as (B, S, N * D)."""
    return [rand(B, rows, N * D), rand(B, keys, kv_heads * D), rand(B, keys, kv_heads * D)]


def heads(*tensors):
    return [x.view(*x.shape[:2], -1, D).transpose(1, 2) for x in tensors]


def merged(out):
    return out.transpose(1, 2).flatten(2)


def causal(q, k, v):
    q, k, v = heads(q, k, v)
    return merged(sdpa(q, k, v, is_causal=True, enable_gqa=True))


def cross(q, k, v):
    return merged(sdpa(*heads(q, k, v)))


def with_cache(q, k, v, key_cache, value_cache):
    q, k, v = heads(q, k, v)
    k, v = torch.cat((key_cache, k), 2), torch.cat((value_cache, v), 2)
    return merged(ATTENTION(q, k, v, scale=0.25, upper=k.size(2) - q.size(2))[0])


def window(q, k, v):
    return merged(ATTENTION(*heads(q, k, v), scale=0.25, lower=-15, upper=0)[0])


def with_lse(q, k, v):
    out, lse = ATTENTION(*heads(q, k, v), scale=0.25, upper=0)
    return merged(out), lse


def masked(q, k, v, mask):
    return merged(sdpa(*heads(q, k, v), mask))


def padded_causal(q, k, v, mask):
    return merged(ATTENTION(*heads(q, k, v), mask, scale=0.25, upper=0)[0])


def padding():
    return torch.arange(S) < torch.tensor([S, S - 9])[:, None, None, None]


def cache():
    return [rand(B, N, CACHED, D), rand(B, N, CACHED, D)]


def prefill(function, *inputs):
    """Compile for NPU: one kernel call, nothing moved or copied around it."""
    report = on_npu(function, *inputs)
    assert [count(report, f"aten.{op}") for op in ("transpose", "permute", "clone", "expand")] == [0, 0, 0, 0]
    return report


def on_npu(function, *inputs):
    report = compiled(function, *inputs)[0]
    assert only_site([report]).kernel == "ascend_fa"
    assert count(report, "npu.npu_fused_infer_attention_score") == 1
    return report


def on_cpu(function, *inputs, inner="eager"):
    report = compiled(function, *inputs, platform="cpu", inner=inner)[0]
    assert only_site([report]).fused
    return report


def no_square(report, rows=S, keys=S):
    assert f"{rows}, {keys}]" not in report.graph


# ---------------------------------------------------------------- NPU


def test_npu_causal():
    report = prefill(causal, *projected())
    no_square(report)
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=triu, num_heads=4, scale=0.176776695, input_layout=BSND, num_key_value_heads=4, sparse_mode=2)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3]""",
    )


def test_npu_causal_with_symbolic_lengths():
    inputs = projected()
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 1)
    assert_expected_inline(
        prefill(causal, *inputs).graph,
        """\
input: s34
input1: bf16[2, s34, 128]
input2: s25
input3: bf16[2, s25, 128]
input4: s25
input5: bf16[2, s25, 128]
view: bf16[2, s34, 4, 32] = aten.view(input1, [2, input, -1, 32])
view1: bf16[2, s25, 4, 32] = aten.view(input3, [2, input2, -1, 32])
view2: bf16[2, s25, 4, 32] = aten.view(input5, [2, input4, -1, 32])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=triu, num_heads=4, scale=0.176776695, input_layout=BSND, num_key_value_heads=4, sparse_mode=2)
getitem: bf16[2, s34, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, s34, 128] = aten.view(getitem, [2, input, 128])
return [view3]""",
    )


def test_npu_bottom_right_causal_over_a_cache():
    """The cache decides the layout, (B, N, S, D); the kernel writes what the output projection reads."""
    report = on_npu(with_cache, *projected(), *cache())
    no_square(report, keys=S + CACHED)
    assert count(report, "aten.clone") == 1
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
input3: bf16[2, 4, 10, 32]
input4: bf16[2, 4, 10, 32]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
transpose: bf16[2, 4, 64, 32] = aten.transpose.int(view, 1, 2)
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
transpose1: bf16[2, 4, 64, 32] = aten.transpose.int(view1, 1, 2)
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
transpose2: bf16[2, 4, 64, 32] = aten.transpose.int(view2, 1, 2)
cat: bf16[2, 4, 74, 32] = aten.cat([input3, transpose1], 2)
cat1: bf16[2, 4, 74, 32] = aten.cat([input4, transpose2], 2)
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
clone: bf16[2, 4, 64, 32] = aten.clone(transpose, memory_format=contiguous_format)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(clone, cat, cat1, atten_mask=triu, num_heads=4, scale=0.25, input_layout=BNSD_BSND, num_key_value_heads=4, sparse_mode=3)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3]""",
    )


def test_npu_sliding_window():
    report = prefill(window, *projected())
    no_square(report)
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=triu, num_heads=4, scale=0.25, pre_tokens=15, next_tokens=0, input_layout=BSND, num_key_value_heads=4, sparse_mode=4)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3]""",
    )


def test_npu_grouped_heads():
    assert_expected_inline(
        prefill(causal, *projected(kv_heads=2)).graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 64]
input2: bf16[2, 64, 64]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
view1: bf16[2, 64, 2, 32] = aten.view(input1, [2, 64, -1, 32])
view2: bf16[2, 64, 2, 32] = aten.view(input2, [2, 64, -1, 32])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=triu, num_heads=4, scale=0.176776695, input_layout=BSND, num_key_value_heads=2, sparse_mode=2)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3]""",
    )


def test_npu_float_mask():
    """A bias has to be given for every head."""
    report = on_npu(masked, *projected(), rand(S, S))
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
input3: bf16[64, 64]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
unsqueeze: bf16[1, 64, 64] = aten.unsqueeze(input3, 0)
unsqueeze1: bf16[1, 1, 64, 64] = aten.unsqueeze(unsqueeze, 1)
expand: bf16[1, 4, 64, 64] = aten.expand(unsqueeze1, [1, 4, 64, 64])
clone: bf16[1, 4, 64, 64] = aten.clone(expand, memory_format=contiguous_format)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, pse_shift=clone, num_heads=4, scale=0.176776695, input_layout=BSND, num_key_value_heads=4, inner_precise=2)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3]""",
    )


def test_npu_padding():
    """A dense mask has to be given for every row; it is inverted once."""
    report = on_npu(masked, *projected(), padding())
    assert count(report, "aten.bitwise_not") == 1
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
input3: b8[2, 1, 1, 64]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
bitwise_not: b8[2, 1, 1, 64] = aten.bitwise_not(input3)
expand: b8[2, 1, 64, 64] = aten.expand(bitwise_not, [2, 1, 64, 64])
clone: b8[2, 1, 64, 64] = aten.clone(expand, memory_format=contiguous_format)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=clone, num_heads=4, scale=0.176776695, input_layout=BSND, num_key_value_heads=4, inner_precise=2)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3]""",
    )


def test_npu_cross_attention():
    assert_expected_inline(
        prefill(cross, *projected(keys=17)).graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 17, 128]
input2: bf16[2, 17, 128]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
view1: bf16[2, 17, 4, 32] = aten.view(input1, [2, 17, -1, 32])
view2: bf16[2, 17, 4, 32] = aten.view(input2, [2, 17, -1, 32])
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, num_heads=4, scale=0.176776695, input_layout=BSND, num_key_value_heads=4)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3]""",
    )


def test_npu_decode():
    report = on_npu(with_cache, *projected(rows=1, keys=1), *cache())
    assert count(report, "aten.clone") == 0
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 1, 128]
input1: bf16[2, 1, 128]
input2: bf16[2, 1, 128]
input3: bf16[2, 4, 10, 32]
input4: bf16[2, 4, 10, 32]
view: bf16[2, 1, 4, 32] = aten.view(input, [2, 1, -1, 32])
view1: bf16[2, 4, 1, 32] = aten.view(view, [2, 4, 1, 32])
view2: bf16[2, 1, 4, 32] = aten.view(input1, [2, 1, -1, 32])
view3: bf16[2, 4, 1, 32] = aten.view(view2, [2, 4, 1, 32])
view4: bf16[2, 1, 4, 32] = aten.view(input2, [2, 1, -1, 32])
view5: bf16[2, 4, 1, 32] = aten.view(view4, [2, 4, 1, 32])
cat: bf16[2, 4, 11, 32] = aten.cat([input3, view3], 2)
cat1: bf16[2, 4, 11, 32] = aten.cat([input4, view5], 2)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view1, cat, cat1, num_heads=4, scale=0.25, input_layout=BNSD, num_key_value_heads=4)
getitem: bf16[2, 4, 1, 32] = getitem(npu_fused_infer_attention_score, 0)
view6: bf16[2, 1, 4, 32] = aten.view(getitem, [2, 1, 4, 32])
view7: bf16[2, 1, 128] = aten.view(view6, [2, 1, 128])
return [view7]""",
    )


def test_npu_lse():
    assert_expected_inline(
        prefill(with_lse, *projected()).graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=triu, num_heads=4, scale=0.25, input_layout=BSND, num_key_value_heads=4, sparse_mode=2, softmax_lse_flag=True)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
getitem1: f32[2, 4, 64, 1] = getitem(npu_fused_infer_attention_score, 1)
squeeze: f32[2, 4, 64] = aten.squeeze.dim(getitem1, -1)
eq: b8[2, 4, 64] = aten.eq.Scalar(squeeze, inf)
masked_fill: f32[2, 4, 64] = aten.masked_fill.Scalar(squeeze, eq, -inf)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3, masked_fill]""",
    )


# ---------------------------------------------------------------- CPU


def test_cpu_causal():
    report = on_cpu(causal, *projected())
    no_square(report)
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
transpose: bf16[2, 4, 64, 32] = aten.transpose.int(view, 1, 2)
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
transpose1: bf16[2, 4, 64, 32] = aten.transpose.int(view1, 1, 2)
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
transpose2: bf16[2, 4, 64, 32] = aten.transpose.int(view2, 1, 2)
scaled_dot_product_flash_attention_for_cpu: tuple = aten._scaled_dot_product_flash_attention_for_cpu(transpose, transpose1, transpose2, 0, True, scale=0.176776695)
getitem: bf16[2, 4, 64, 32] = getitem(scaled_dot_product_flash_attention_for_cpu, 0)
permute: bf16[2, 64, 4, 32] = aten.permute(getitem, [0, 2, 1, 3])
permute1: bf16[2, 4, 64, 32] = aten.permute(permute, [0, 2, 1, 3])
transpose3: bf16[2, 64, 4, 32] = aten.transpose.int(permute1, 1, 2)
view3: bf16[2, 64, 128] = aten.view(transpose3, [2, 64, 128])
return [view3]""",
    )


def test_cpu_bottom_right_causal_is_two_calls_and_no_square():
    report = on_cpu(with_cache, *projected(), *cache())
    no_square(report, keys=S + CACHED)
    assert count(report, "aten._scaled_dot_product_flash_attention_for_cpu") == 2
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
input3: bf16[2, 4, 10, 32]
input4: bf16[2, 4, 10, 32]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
transpose: bf16[2, 4, 64, 32] = aten.transpose.int(view, 1, 2)
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
transpose1: bf16[2, 4, 64, 32] = aten.transpose.int(view1, 1, 2)
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
transpose2: bf16[2, 4, 64, 32] = aten.transpose.int(view2, 1, 2)
cat: bf16[2, 4, 74, 32] = aten.cat([input3, transpose1], 2)
cat1: bf16[2, 4, 74, 32] = aten.cat([input4, transpose2], 2)
slice: bf16[2, 4, 10, 32] = aten.slice.Tensor(cat, 2, 0, 10)
slice1: bf16[2, 4, 10, 32] = aten.slice.Tensor(cat1, 2, 0, 10)
scaled_dot_product_flash_attention_for_cpu: tuple = aten._scaled_dot_product_flash_attention_for_cpu(transpose, slice, slice1, scale=0.25)
getitem: bf16[2, 4, 64, 32] = getitem(scaled_dot_product_flash_attention_for_cpu, 0)
getitem1: f32[2, 4, 64] = getitem(scaled_dot_product_flash_attention_for_cpu, 1)
slice2: bf16[2, 4, 64, 32] = aten.slice.Tensor(cat, 2, 10, 9223372036854775807)
slice3: bf16[2, 4, 64, 32] = aten.slice.Tensor(cat1, 2, 10, 9223372036854775807)
scaled_dot_product_flash_attention_for_cpu1: tuple = aten._scaled_dot_product_flash_attention_for_cpu(transpose, slice2, slice3, 0, True, scale=0.25)
getitem2: bf16[2, 4, 64, 32] = getitem(scaled_dot_product_flash_attention_for_cpu1, 0)
getitem3: f32[2, 4, 64] = getitem(scaled_dot_product_flash_attention_for_cpu1, 1)
sub: f32[2, 4, 64] = aten.sub.Tensor(getitem3, getitem1)
sigmoid: f32[2, 4, 64] = aten.sigmoid(sub)
unsqueeze: f32[2, 4, 64, 1] = aten.unsqueeze(sigmoid, -1)
to_copy: f32[2, 4, 64, 32] = aten._to_copy(getitem2, dtype=float32)
sub1: f32[2, 4, 64, 32] = aten.sub.Tensor(to_copy, getitem)
mul: f32[2, 4, 64, 32] = aten.mul.Tensor(unsqueeze, sub1)
add: f32[2, 4, 64, 32] = aten.add.Tensor(getitem, mul)
to_copy1: bf16[2, 4, 64, 32] = aten._to_copy(add, dtype=bfloat16)
transpose3: bf16[2, 64, 4, 32] = aten.transpose.int(to_copy1, 1, 2)
view3: bf16[2, 64, 128] = aten.view(transpose3, [2, 64, 128])
return [view3]""",
    )


def test_cpu_padding_and_causal_are_one_call_with_a_mask_of_one_row():
    report = on_cpu(padded_causal, *projected(), padding())
    no_square(report)
    assert count(report, "aten._scaled_dot_product_flash_attention_for_cpu") == 1
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
input3: b8[2, 1, 1, 64]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
transpose: bf16[2, 4, 64, 32] = aten.transpose.int(view, 1, 2)
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
transpose1: bf16[2, 4, 64, 32] = aten.transpose.int(view1, 1, 2)
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
transpose2: bf16[2, 4, 64, 32] = aten.transpose.int(view2, 1, 2)
zeros: bf16[] = aten.zeros([], dtype=bfloat16, device=cpu, pin_memory=False)
scalar_tensor: bf16[] = aten.scalar_tensor(-inf, dtype=bfloat16, layout=strided, device=cpu)
where: bf16[2, 1, 1, 64] = aten.where.self(input3, zeros, scalar_tensor)
scaled_dot_product_flash_attention_for_cpu: tuple = aten._scaled_dot_product_flash_attention_for_cpu(transpose, transpose1, transpose2, 0, True, attn_mask=where, scale=0.25)
getitem: bf16[2, 4, 64, 32] = getitem(scaled_dot_product_flash_attention_for_cpu, 0)
transpose3: bf16[2, 64, 4, 32] = aten.transpose.int(getitem, 1, 2)
view3: bf16[2, 64, 128] = aten.view(transpose3, [2, 64, 128])
return [view3]""",
    )


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="FlexAttention on CPU needs AVX2")
def test_cpu_window_is_flex_attention():
    report = on_cpu(window, *projected(), inner="inductor")
    no_square(report)
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 128]
input2: bf16[2, 64, 128]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
permute: bf16[2, 4, 64, 32] = aten.permute(view, [0, 2, 1, 3])
view1: bf16[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
permute1: bf16[2, 4, 64, 32] = aten.permute(view1, [0, 2, 1, 3])
view2: bf16[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
permute2: bf16[2, 4, 64, 32] = aten.permute(view2, [0, 2, 1, 3])
iota: i32[1] = prims.iota(1, start=0, step=1, dtype=int32, device=cpu, requires_grad=False)
add: i32[1] = aten.add.Tensor(iota, -1)
clamp_min: i32[1] = aten.clamp_min(add, 0)
add1: i32[1] = aten.add.Tensor(iota, 0)
clamp_max: i32[1] = aten.clamp_max(add1, 0)
sub: i32[1] = aten.sub.Tensor(clamp_max, clamp_min)
add2: i32[1] = aten.add.Tensor(sub, 1)
clamp_min1: i32[1] = aten.clamp_min(add2, 0)
unsqueeze: i32[1, 1] = aten.unsqueeze(clamp_min, -1)
add3: i32[1, 1] = aten.add.Tensor(unsqueeze, iota)
clamp_max1: i32[1, 1] = aten.clamp_max(add3, 0)
unsqueeze1: i32[1, 1] = aten.unsqueeze(clamp_min1, 0)
unsqueeze2: i32[1, 1, 1] = aten.unsqueeze(unsqueeze1, 1)
unsqueeze3: i32[1, 1, 1] = aten.unsqueeze(clamp_max1, 0)
unsqueeze4: i32[1, 1, 1, 1] = aten.unsqueeze(unsqueeze3, 1)
convert_element_type: f32[2, 4, 64, 32] = prims.convert_element_type(permute, float32)
convert_element_type1: f32[2, 4, 64, 32] = prims.convert_element_type(permute1, float32)
convert_element_type2: f32[2, 4, 64, 32] = prims.convert_element_type(permute2, float32)
sgl_npu_sdpa_score0_0: - = _sgl_npu_sdpa_score0_0()
sgl_npu_sdpa_mask0_0: - = _sgl_npu_sdpa_mask0_0()
flex_attention: tuple = flex_attention(convert_element_type, convert_element_type1, convert_element_type2, sgl_npu_sdpa_score0_0, [64, 64, unsqueeze2, unsqueeze4, None, None, None, None, None, None, None, None, None, None, 128, 128, sgl_npu_sdpa_mask0_0], 0.25, {'BACKEND': 'AUTO', 'PRESCALE_QK': False, 'ROWS_GUARANTEED_SAFE': False, 'BLOCKS_ARE_CONTIGUOUS': False, 'WRITE_DQ': True, 'OUTPUT_LOGSUMEXP': False, 'OUTPUT_MAX': False}, [], [])
getitem: f32[2, 4, 64, 32] = getitem(flex_attention, 0)
convert_element_type3: bf16[2, 4, 64, 32] = prims.convert_element_type(getitem, bfloat16)
permute3: bf16[2, 64, 4, 32] = aten.permute(convert_element_type3, [0, 2, 1, 3])
view3: bf16[2, 64, 128] = aten.view(permute3, [2, 64, 128])
return [view3]""",
    )
