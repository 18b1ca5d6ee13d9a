# ruff: noqa: E501
"""The final graphs of attention written by hand, to the last node. Regenerate with EXPECTTEST_ACCEPT=1, then read."""

import torch
from expecttest import assert_expected_inline
from test_golden_graphs import heads, merged, no_square, on_cpu, prefill, projected


def by_hand(q, k, v):
    """What transformers writes: repeated heads, an added mask of the lowest number, softmax in float32."""
    q, k, v = heads(q, k, v)
    k, v = (x[:, :, None].expand(-1, -1, q.size(1) // x.size(1), -1, -1).flatten(1, 2) for x in (k, v))
    keep = torch.arange(k.size(2)) <= torch.arange(q.size(2))[:, None]
    mask = torch.where(keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    scores = q @ k.mT * 0.25 + mask
    return merged(scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v)


def padded(q, k, v, padding):
    q, k, v = heads(q, k, v)
    keep = (torch.arange(k.size(2)) <= torch.arange(q.size(2))[:, None]) & padding[:, None, None, :]
    scores = (q @ k.mT * 0.25).masked_fill(~keep, torch.finfo(q.dtype).min)
    return merged(scores.softmax(-1) @ v)


def test_npu_by_hand():
    report = prefill(by_hand, *projected(kv_heads=1))
    no_square(report)
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 64, 128]
input1: bf16[2, 64, 32]
input2: bf16[2, 64, 32]
view: bf16[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
view1: bf16[2, 64, 1, 32] = aten.view(input1, [2, 64, -1, 32])
view2: bf16[2, 64, 1, 32] = aten.view(input2, [2, 64, -1, 32])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=triu, num_heads=4, scale=0.25, input_layout=BSND, num_key_value_heads=1, sparse_mode=2)
getitem: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, 64, 128] = aten.view(getitem, [2, 64, 128])
return [view3]""",
    )


def test_npu_by_hand_with_symbolic_lengths():
    inputs = projected(kv_heads=2)
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 1)
    assert_expected_inline(
        prefill(by_hand, *inputs).graph,
        """\
input: s34
input1: bf16[2, s34, 128]
input2: s25
input3: bf16[2, s25, 64]
input4: s25
input5: bf16[2, s25, 64]
view: bf16[2, s34, 4, 32] = aten.view(input1, [2, input, -1, 32])
view1: bf16[2, s25, 2, 32] = aten.view(input3, [2, input2, -1, 32])
view2: bf16[2, s25, 2, 32] = aten.view(input5, [2, input2, -1, 32])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=triu, num_heads=4, scale=0.25, input_layout=BSND, num_key_value_heads=2, sparse_mode=2)
getitem: bf16[2, s34, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, s34, 128] = aten.view(getitem, [2, input, 128])
return [view3]""",
    )


def test_cpu_padding_that_may_empty_rows():
    padding = torch.ones(2, 64, dtype=torch.bool)
    padding[1, :5] = False
    inputs = [x.float() for x in projected()]
    report = on_cpu(padded, *inputs, padding)
    no_square(report)
    assert_expected_inline(
        report.graph,
        """\
input: f32[2, 64, 128]
input1: f32[2, 64, 128]
input2: f32[2, 64, 128]
input3: b8[2, 64]
view: f32[2, 64, 4, 32] = aten.view(input, [2, 64, -1, 32])
transpose: f32[2, 4, 64, 32] = aten.transpose.int(view, 1, 2)
view1: f32[2, 64, 4, 32] = aten.view(input1, [2, 64, -1, 32])
transpose1: f32[2, 4, 64, 32] = aten.transpose.int(view1, 1, 2)
view2: f32[2, 64, 4, 32] = aten.view(input2, [2, 64, -1, 32])
transpose2: f32[2, 4, 64, 32] = aten.transpose.int(view2, 1, 2)
unsqueeze: b8[2, 1, 64] = aten.unsqueeze(input3, 1)
unsqueeze1: b8[2, 1, 1, 64] = aten.unsqueeze(unsqueeze, 2)
zeros: f32[] = aten.zeros([], dtype=float32, device=cpu, pin_memory=False)
scalar_tensor: f32[] = aten.scalar_tensor(-inf, dtype=float32, layout=strided, device=cpu)
where: f32[2, 1, 1, 64] = aten.where.self(unsqueeze1, zeros, scalar_tensor)
scaled_dot_product_flash_attention_for_cpu: tuple = aten._scaled_dot_product_flash_attention_for_cpu(transpose, transpose1, transpose2, 0, True, attn_mask=where, scale=0.25)
getitem: f32[2, 4, 64, 32] = getitem(scaled_dot_product_flash_attention_for_cpu, 0)
getitem1: f32[2, 4, 64] = getitem(scaled_dot_product_flash_attention_for_cpu, 1)
squeeze: b8[2, 1, 64] = aten.squeeze.dim(unsqueeze1, 2)
expand: b8[2, 1, 64] = aten.expand(squeeze, [2, 1, 64])
cumsum: i64[2, 1, 64] = aten.cumsum(expand, -1)
constant_pad_nd: i64[2, 1, 65] = aten.constant_pad_nd(cumsum, [1, 0], 0)
arange: i64[64] = aten.arange(64, device=cpu, pin_memory=False)
zeros_like: i64[64] = aten.zeros_like(arange, pin_memory=False)
add: i64[64] = aten.add.Tensor(arange, 0)
add1: i64[64] = aten.add.Tensor(add, 1)
clamp: i64[64] = aten.clamp(add1, 0, 64)
index_select: i64[2, 1, 64] = aten.index_select(constant_pad_nd, -1, clamp)
index_select1: i64[2, 1, 64] = aten.index_select(constant_pad_nd, -1, zeros_like)
le: b8[2, 1, 64] = aten.le.Tensor(index_select, index_select1)
masked_fill: f32[2, 4, 64] = aten.masked_fill.Scalar(getitem1, le, -inf)
permute: f32[2, 64, 4, 32] = aten.permute(getitem, [0, 2, 1, 3])
mean: f32[2, 4, 1, 32] = aten.mean.dim(transpose2, [2], True)
eq: b8[2, 4, 64] = aten.eq.Scalar(masked_fill, -inf)
unsqueeze2: b8[2, 4, 64, 1] = aten.unsqueeze(eq, -1)
transpose3: b8[2, 64, 4, 1] = aten.transpose.int(unsqueeze2, 1, 2)
transpose4: f32[2, 1, 4, 32] = aten.transpose.int(mean, 1, 2)
where1: f32[2, 64, 4, 32] = aten.where.self(transpose3, transpose4, permute)
clone: f32[2, 64, 4, 32] = aten.clone(where1, memory_format=contiguous_format)
view3: f32[2, 64, 128] = aten.view(clone, [2, 64, 128])
return [view3]""",
    )
