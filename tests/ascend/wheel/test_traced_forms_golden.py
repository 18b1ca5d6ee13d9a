# ruff: noqa: E501
"""The final graphs of what was traced on an NPU. Regenerate with EXPECTTEST_ACCEPT=1, then read what changed."""

import pytest
import torch
import torch.nn.functional as F
from both_devices import NPU, compiled_on, compiled_on_both
from expecttest import assert_expected_inline
from test_golden_graphs import cache, padded_causal, padding, projected, window, with_cache, with_lse
from test_golden_matches import by_hand, padded

PINNED = {  # functions whose graph, traced on the CPU, is pinned in the modules they come from
    "by hand": (by_hand, lambda: projected(kv_heads=1)),
    "by hand, padded": (padded, lambda: [*projected(), torch.arange(64) < torch.tensor([64, 55])[:, None]]),
    "window": (window, projected),
    "with lse": (with_lse, projected),
    "padding under a triangle": (padded_causal, lambda: [*projected(), padding()]),
    "with a cache": (with_cache, lambda: [*projected(rows=1, keys=1), *cache()]),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PINNED)
def test_a_graph_is_the_one_that_the_cpu_traces(name):
    function, inputs = PINNED[name]
    cpu, npu = compiled_on_both(function, inputs())
    assert cpu.graph == npu.graph and npu.reports[0].sites[0].kernel == "ascend_fa"


def rand(*shape):
    return torch.randn(shape, dtype=torch.bfloat16) / 4


def layer(x, q_proj, kv_proj, o_proj):
    """Linear maps without bias, which stay one matmul each; heads repeated for a group; softmax in float32."""
    q = F.linear(x, q_proj).view(*x.shape[:2], 4, 32).transpose(1, 2)
    k, v = F.linear(x, kv_proj).view(*x.shape[:2], 2, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    k, v = (y.repeat_interleave(2, 1) for y in (k, v))
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1), -torch.inf)
    out = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    return F.linear(out.transpose(1, 2).flatten(2), o_proj)


def weights():
    return rand(128, 64), rand(128, 64), rand(64, 128)


def test_a_layer_by_hand():
    """Not the graph of the CPU, where a linear map is view, mm and view."""
    assert_expected_inline(
        compiled_on(NPU, layer, (rand(2, 64, 64), *weights())).graph,
        """\
input: bf16[2, 64, 64]
input1: bf16[128, 64]
input2: bf16[128, 64]
input3: bf16[64, 128]
t: bf16[64, 128] = aten.t(input1)
matmul: bf16[2, 64, 128] = aten.matmul(input, t)
view: bf16[2, 64, 4, 32] = aten.view(matmul, [2, 64, 4, 32])
t1: bf16[64, 128] = aten.t(input2)
matmul1: bf16[2, 64, 128] = aten.matmul(input, t1)
view1: bf16[2, 64, 2, 2, 32] = aten.view(matmul1, [2, 64, 2, 2, 32])
permute: bf16[2, 2, 2, 64, 32] = aten.permute(view1, [2, 0, 3, 1, 4])
unbind: tuple = aten.unbind.int(permute)
getitem: bf16[2, 2, 64, 32] = getitem(unbind, 0)
getitem1: bf16[2, 2, 64, 32] = getitem(unbind, 1)
transpose: bf16[2, 64, 2, 32] = aten.transpose.int(getitem, 1, 2)
transpose1: bf16[2, 64, 2, 32] = aten.transpose.int(getitem1, 1, 2)
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=_, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
clone: bf16[2, 64, 2, 32] = aten.clone(transpose, memory_format=contiguous_format)
clone1: bf16[2, 64, 2, 32] = aten.clone(transpose1, memory_format=contiguous_format)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, clone, clone1, atten_mask=triu, num_heads=4, scale=0.25, input_layout=BSND, num_key_value_heads=2, sparse_mode=2)
getitem2: bf16[2, 64, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view2: bf16[2, 64, 128] = aten.view(getitem2, [2, 64, 128])
t2: bf16[128, 64] = aten.t(input3)
matmul2: bf16[2, 64, 64] = aten.matmul(view2, t2)
return [matmul2]""",
    )


def called(x, q_proj, o_proj):
    q, k, v = (F.linear(x, q_proj).view(*x.shape[:2], 4, 32).transpose(1, 2) for _ in range(3))
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), o_proj)


def test_a_layer_that_calls_sdpa_with_symbolic_lengths():
    q_proj, _, o_proj = weights()
    calls = [(rand(2, length, 64), q_proj, o_proj) for length in (64, 40)]
    assert_expected_inline(
        compiled_on(NPU, called, *calls, dynamic=[1]).graph,
        """\
input: s27
input1: bf16[2, s27, 64]
input2: bf16[128, 64]
input3: bf16[64, 128]
t: bf16[64, 128] = aten.t(input2)
matmul: bf16[2, s27, 128] = aten.matmul(input1, t)
view: bf16[2, s27, 4, 32] = aten.view(matmul, [2, input, 4, 32])
t1: bf16[64, 128] = aten.t(input2)
matmul1: bf16[2, s27, 128] = aten.matmul(input1, t1)
view1: bf16[2, s27, 4, 32] = aten.view(matmul1, [2, input, 4, 32])
t2: bf16[64, 128] = aten.t(input2)
matmul2: bf16[2, s27, 128] = aten.matmul(input1, t2)
view2: bf16[2, s27, 4, 32] = aten.view(matmul2, [2, input, 4, 32])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=_, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(view, view1, view2, atten_mask=triu, num_heads=4, scale=0.176776695, input_layout=BSND, num_key_value_heads=4, sparse_mode=2)
getitem: bf16[2, s27, 4, 32] = getitem(npu_fused_infer_attention_score, 0)
view3: bf16[2, s27, 128] = aten.view(getitem, [2, input, 128])
t3: bf16[128, 64] = aten.t(input3)
matmul3: bf16[2, s27, 64] = aten.matmul(view3, t3)
return [matmul3]""",
    )


def one_key_head(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def test_one_key_head_that_matmul_broadcasts():
    cpu, npu = compiled_on_both(one_key_head, [rand(2, 4, 24, 32), rand(2, 1, 20, 32), rand(2, 1, 20, 32)])
    assert cpu.graph == npu.graph
    assert_expected_inline(
        npu.graph,
        """\
input: bf16[2, 1, 20, 32]
input1: bf16[2, 4, 24, 32]
input2: bf16[2, 1, 20, 32]
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(input1, input, input2, num_heads=4, scale=0.25, input_layout=BNSD, num_key_value_heads=1)
getitem: bf16[2, 4, 24, 32] = getitem(npu_fused_infer_attention_score, 0)
return [getitem]""",
    )


def test_a_batch_that_matmul_broadcasts_is_expanded():
    """Not the graph of the CPU, where torch writes the expansion and a copy."""
    call = rand(2, 4, 24, 32), rand(1, 4, 20, 32), rand(1, 4, 20, 32)
    assert_expected_inline(
        compiled_on(NPU, one_key_head, call).graph,
        """\
input: bf16[1, 4, 20, 32]
input1: bf16[2, 4, 24, 32]
input2: bf16[1, 4, 20, 32]
transpose: bf16[1, 4, 32, 20] = aten.transpose.int(input, -2, -1)
expand: bf16[2, 4, 32, 20] = aten.expand(transpose, [2, 4, 32, 20])
permute: bf16[2, 4, 20, 32] = aten.permute(expand, [0, 1, 3, 2])
expand1: bf16[2, 4, 20, 32] = aten.expand(input2, [2, 4, 20, 32])
clone: bf16[2, 4, 20, 32] = aten.clone(permute, memory_format=contiguous_format)
clone1: bf16[2, 4, 20, 32] = aten.clone(expand1, memory_format=contiguous_format)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(input1, clone, clone1, num_heads=4, scale=0.25, input_layout=BNSD, num_key_value_heads=4)
getitem: bf16[2, 4, 24, 32] = getitem(npu_fused_infer_attention_score, 0)
return [getitem]""",
    )


def test_what_no_kernel_takes_keeps_matmul_whole():
    def softcapped(q, k, v):
        return (5.0 * torch.tanh(q @ k.mT * 0.25 / 5.0)).softmax(-1) @ v

    graph = compiled_on(NPU, softcapped, [rand(2, 4, 24, 32) for _ in range(3)]).graph
    assert graph.count("aten.matmul(") == 2 and "aten.bmm" not in graph and "npu." not in graph
