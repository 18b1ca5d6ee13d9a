"""Calls of scaled_dot_product_attention are captured before torch_npu's own kernel for them is asked."""

import pytest
import torch
import torch.nn.functional as F
from both_devices import CPU, NPU, OPTIONS, compiled_on, compiled_on_both

import sgl_npu

sdpa = F.scaled_dot_product_attention
FIA, V3 = "npu.npu_fused_infer_attention_score", "npu.npu_fusion_attention_v3"


def tensors(*lead, rows=24, keys=24, kv_heads=None, dim=16, dtype=torch.bfloat16):
    kv = lead if kv_heads is None else (*lead[:-1], kv_heads)
    return [torch.randn(*shape, dim, dtype=dtype) / 2 for shape in ((*lead, rows), (*kv, keys), (*kv, keys))]


def triangle(q, k, v):
    return sdpa(q, k, v, torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril())


def additive(q, k, v):
    gone = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).triu(1)
    return sdpa(q, k, v, torch.zeros(gone.shape, dtype=q.dtype).masked_fill(gone, float("-inf")))


def biased(q, k, v):
    return sdpa(q, k, v, torch.arange(k.size(-2))[None].to(q.dtype) / 8)


def grouped(q, k, v):
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def repeated(q, k, v):
    return sdpa(q, *(x.repeat_interleave(2, 1) for x in (k, v)), is_causal=True)


def projected(q, k, v):
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2).flatten(2)


def causal(q, k, v):
    return sdpa(q, k, v, is_causal=True)


BATCH = (2, 4)
CALLS = {
    "plain": (lambda q, k, v: sdpa(q, k, v), {}, "full", FIA),
    "is_causal": (causal, {}, "causal", FIA),
    "more keys than rows": (causal, {"rows": 7}, "causal", FIA),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), {}, "full", FIA),
    "bool mask": (triangle, {}, "causal", FIA),
    "float mask of 0 and -inf": (additive, {}, "causal", FIA),
    "float mask": (biased, {}, "full + bias", FIA),
    "enable_gqa": (grouped, {"kv_heads": 2}, "causal", FIA),
    "repeated heads": (repeated, {"kv_heads": 2}, "causal", FIA),
    "from projections": (projected, {}, "causal", FIA),
    "float32": (causal, {"dtype": torch.float32}, "causal", V3),
    "float16": (causal, {"dtype": torch.float16}, "causal", FIA),
    "D of 40": (causal, {"dim": 40}, "causal", FIA),
}
RANKS = {"2": (), "3": (4,), "5": (3, 2, 4)}


def arguments(name, length):
    function, sizes, *_ = CALLS[name]
    call = tensors(*BATCH, **{"rows": length, "keys": length, **sizes})
    return [x.transpose(1, 2).contiguous() for x in call] if function is projected else call


@pytest.mark.parametrize("name", [name for name in CALLS if name != "from projections"])
def test_a_call_is_the_same_graph_on_both(name):
    torch.manual_seed(0)
    cpu, npu = compiled_on_both(CALLS[name][0], arguments(name, 24))
    assert cpu.graph == npu.graph and cpu.sites == npu.sites


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_one_graph_for_all_lengths_in_the_op_that_our_table_chose(name):
    torch.manual_seed(0)
    function, _, mask, op = CALLS[name]
    calls = [arguments(name, length) for length in (24, 17, 40)]
    npu = compiled_on(NPU, function, *calls, dynamic=[1 if function is projected else 2])
    (report,) = npu.reports
    (site,) = report.sites
    assert (site.mask, site.op) == (mask, op)
    assert npu.graph.count(f"{V3}(") == (op == V3)


@pytest.mark.parametrize("rank", RANKS)
def test_a_call_of_another_rank_is_captured_too(rank):
    torch.manual_seed(0)
    cpu, npu = compiled_on_both(causal, tensors(*RANKS[rank]))
    assert cpu.graph == npu.graph and cpu.sites == npu.sites
    assert [site.op for site in npu.reports[0].sites] == [FIA]


@pytest.mark.parametrize("grad", [False, True])
def test_a_call_that_capture_leaves_to_torch_is_torch_npu_s_own(grad):
    """Dropout, which the emulation does not have: the call says so once it runs, in the op of torch_npu."""
    before = len(sgl_npu.reports())
    torch._dynamo.reset()
    run = torch.compile(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), backend="sgl_npu", options=OPTIONS)
    call = [x.to(NPU).requires_grad_(grad) for x in tensors(*BATCH)]
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="npu_fusion_attention_v3: keep_prob"):
        run(*call)
    (site,) = sgl_npu.reports()[before].sites
    assert not site.fused and "dropout_p = 0.5" in site.refusals[0][1]


def test_attention_sdpa_leaves_every_call_to_torch_npu():
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    run = torch.compile(causal, backend="sgl_npu", options={**OPTIONS, "attention": "sdpa"})
    call = tensors(*BATCH)
    with torch.no_grad():
        torch.testing.assert_close(run(*(x.to(NPU) for x in call)).cpu(), causal(*call), atol=2e-2, rtol=2e-2)
    assert "npu_fusion_attention_v3" in sgl_npu.reports()[before].graph


def test_a_number_known_at_run_time_as_scale_is_no_reason_to_leave_a_call():
    torch.manual_seed(0)
    q, k, v = tensors(*BATCH)

    def scaled(q, k, v, scale):
        return sdpa(q, k, v, scale=scale)

    for device in (CPU, NPU):
        (report,) = compiled_on(device, scaled, (q, k, v, 0.5), (q, k, v, 0.5)).reports
        assert [site.op for site in report.sites] == [FIA]
