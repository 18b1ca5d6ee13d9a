"""Attention that Dynamo's graph spells as a torch call: every argument and layer against eager, and its mask."""

import math

import pytest
import torch
import torch.nn.functional as F
from captured_sites import FP32, compiled_sites, keep, masks, randn, reasons
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import flex_attention

import sgl_npu

sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


Q, K = (2, 4, 5, 8), (2, 4, 7, 8)

# ---------------------------------------------------------------- scaled_dot_product_attention: shapes

SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 8)),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "4-D": (Q, K, K),
    "5-D": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "6-D": ((1, 2, 3, 2, 5, 8), (1, 2, 3, 2, 7, 8), (1, 2, 3, 2, 7, 8)),
    "one head for all": (Q, (2, 1, 7, 8), (2, 1, 7, 8)),
    "one batch for all": (Q, (1, 4, 7, 8), (1, 4, 7, 8)),
    "query broadcast": ((1, 1, 5, 8), K, (1, 4, 7, 8)),
    "value heads broadcast": (Q, K, (2, 1, 7, 8)),
    "5-D, each broadcast elsewhere": ((3, 1, 4, 5, 8), (1, 2, 4, 7, 8), (3, 2, 1, 7, 8)),
    "3-D broadcast": ((4, 5, 8), (1, 7, 8), (4, 7, 8)),
    "one query": ((2, 4, 1, 8), K, K),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_and_broadcast_is_one_fused_site_whose_out_can_be_viewed(shape, causal):
    sites = compiled_sites(lambda q, k, v: sdpa(q, k, v, is_causal=causal).view(-1), *randn(*SHAPES[shape]))
    assert masks(sites) == ["causal" if causal else "full"]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=["BNSD", "BSND", "SBND"])
@pytest.mark.parametrize("masked", [False, True])
def test_out_has_the_strides_of_torchs_own_result(order, masked):
    q, k, v = (torch.randn(5, 5, 5, 8).permute(order) for _ in range(3))
    sites = compiled_sites(lambda q, k, v, m: sdpa(q, k, v, m if masked else None), q, k, v, keep(5, 1, 1, 5))
    assert masks(sites) == ["tensor" if masked else "full"]


def test_a_view_through_transposes_sees_the_order_of_torchs_own_result():
    def run(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            out = sdpa(q, k, v)
        return out.transpose(2, 3).transpose(2, 3).view(2, -1)

    assert masks(compiled_sites(run, *(x.transpose(1, 2) for x in randn(*[(2, 5, 4, 8)] * 3)))) == ["full"]


def test_dv_unlike_d_is_a_site_with_the_answer_of_eager():
    sites = compiled_sites(lambda q, k, v: sdpa(q, k, v).view(-1), *randn(Q, K, (2, 4, 7, 6)))
    assert [site.mask for site in sites] == ["full"]


@pytest.mark.parametrize("shape", [((2, 4, 0, 8), K, K), (Q, (2, 4, 0, 8), (2, 4, 0, 8)), ((0, 4, 5, 8),) * 3], ids=str)
def test_an_empty_query_key_or_batch_is_answered_as_eager_does(shape):
    assert len(compiled_sites(lambda q, k, v: sdpa(q, k, v), *randn(*shape))) == 1


@pytest.mark.parametrize(
    "shape", [((2, 4, 5, 8), (2, 2, 7, 8)), ((2, 4, 5, 8), (2, 1, 7, 8)), ((4, 5, 8), (2, 7, 8))], ids=str
)
def test_grouped_heads_are_one_fused_site(shape):
    q, k = shape
    sites = compiled_sites(lambda q, k, v: sdpa(q, k, v, enable_gqa=True, is_causal=True), *randn(q, k, k))
    assert masks(sites) == ["causal"]


def test_key_and_value_of_different_head_counts_are_left_to_torch():
    sites = compiled_sites(
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True), *randn((2, 8, 5, 8), (2, 2, 7, 8), (2, 4, 7, 8))
    )
    assert reasons(sites) == ["8 query heads over 2 and 4 key and value heads: no single group size"]


# ---------------------------------------------------------------- scaled_dot_product_attention: masks, numbers

MASKS = [
    (5, 1),
    (1, 7),
    (5, 7),
    (4, 5, 7),
    (1, 5, 7),
    (4, 1, 7),
    (2, 1, 1, 7),
    (2, 4, 1, 1),
    (1, 1, 5, 7),
    (2, 4, 5, 7),
]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_broadcasts_in_every_dimension(shape, kind):
    mask = keep(*shape) if kind == "bool" else torch.randn(shape)
    sites = compiled_sites(lambda q, k, v, m: sdpa(q, k, v, m), *randn(Q, K, K), mask)
    assert masks(sites) == ["tensor" if kind == "bool" else "full + bias"]


@pytest.mark.parametrize(
    "shape", [(5, 7), (4, 1, 7), (1, 4, 5, 7), (3, 1, 5, 7), (1, 2, 1, 5, 7), (3, 2, 1, 1, 7)], ids=str
)
def test_a_mask_broadcasts_over_two_batch_dimensions(shape):
    q, k, v = randn((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8))
    if len(shape) == 4 and shape[0] == 3:
        q, k, v = (x[:, :1] for x in (q, k, v))
        shape = (3, 1, *shape[1:])
    assert masks(compiled_sites(lambda q, k, v, m: sdpa(q, k, v, m), q, k, v, keep(*shape))) == ["tensor"]


@pytest.mark.parametrize("mask", [torch.zeros(5, 7).bool(), torch.full((5, 7), -math.inf)], ids=["bool", "float"])
def test_rows_without_any_key_are_what_eager_makes_of_them(mask):
    compiled_sites(lambda q, k, v: sdpa(q, k, v, mask), *randn(Q, K, K))


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)], ids=str)
def test_is_causal_is_top_left_also_where_lengths_differ(lengths):
    rows, keys = lengths
    q, k, v = randn((2, 4, rows, 8), (2, 4, keys, 8), (2, 4, keys, 8))
    assert masks(compiled_sites(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, v)) == ["causal"]
    top_left = torch.ones(rows, keys, dtype=torch.bool).tril()
    compiled = torch.compile(lambda q, k, v: sdpa(q, k, v, is_causal=True), backend="sgl_npu")
    torch.testing.assert_close(compiled(q, k, v), sdpa(q, k, v, top_left))


def test_is_causal_beside_a_mask_means_both_where_torch_takes_both():
    mask = keep(5, 7) | torch.eye(5, 7).bool()
    assert masks(compiled_sites(lambda q, k, v: sdpa(q, k, v, mask, is_causal=True), *randn(Q, K, K))) == [
        "causal & tensor"
    ]


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_torchs_causal_bias_objects_keep_their_corner(bias):
    sites = compiled_sites(lambda q, k, v: sdpa(q, k, v, bias(5, 7)), *randn(Q, K, K))
    assert len(masks(sites)) == 1
    assert bias is causal_lower_right or sites[0].mask == "causal"


@pytest.mark.parametrize("scale", [0.3, 2, 0.0, -0.5, None])
def test_a_constant_scale_is_kept(scale):
    assert masks(compiled_sites(lambda q, k, v: sdpa(q, k, v, scale=scale), *randn(Q, K, K))) == ["full"]


class Scaled(nn.Module):
    scale = 0.3

    def forward(self, q, k, v):
        return sdpa(q, k, v, scale=self.scale)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_a_scale_that_changes_between_calls_is_not_baked_in(dynamic):
    model, qkv = Scaled(), randn(Q, K, K)
    compiled = torch.compile(model, backend="sgl_npu", options={"inner": "eager"}, dynamic=dynamic)
    for scale in (0.3, 0.7, 1.9):
        model.scale = scale
        torch.testing.assert_close(compiled(*qkv), model(*qkv))
        assert masks(sgl_npu.reports()[-1].sites) == ["full"]


def test_the_default_scale_of_a_symbolic_head_size_follows_the_head_size():
    compiled = torch.compile(lambda q, k, v: sdpa(q, k, v), backend="sgl_npu", options={"inner": "eager"}, dynamic=True)
    before = len(sgl_npu.reports())
    for dim in (8, 12, 20):
        qkv = randn((2, 4, 5, dim), (2, 4, 7, dim), (2, 4, 7, dim))
        torch.testing.assert_close(compiled(*qkv), sdpa(*qkv), **FP32)
    assert len(sgl_npu.reports()) == before + 1


@pytest.mark.parametrize("read", [lambda s: s, lambda s: s.item()], ids=["tensor", "item"])
def test_a_scale_in_a_tensor_is_answered_as_eager_does(read):
    compiled_sites(lambda q, k, v, s: sdpa(q, k, v, scale=read(s)), *randn(Q, K, K), torch.tensor(0.3))


SPELLINGS = {
    "keyword": lambda q, k, v: sdpa(value=v, query=q, key=k, is_causal=True),
    "positional": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "torch._C._nn": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "aten packet": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=True),
    "aten overload": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v, None, 0.0, True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_call_is_captured(spelling):
    assert masks(compiled_sites(SPELLINGS[spelling], *randn(Q, K, K))) == ["causal"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.float32])
def test_every_dtype_and_a_mask_of_another_is_captured(dtype, mask_dtype):
    mask = None if mask_dtype is None else keep(5, 7).to(mask_dtype)
    sites = compiled_sites(lambda q, k, v: sdpa(q, k, v, mask), *randn(Q, K, K, dtype=dtype))
    assert masks(sites) == [{None: "full", torch.bool: "tensor", torch.float32: "full + bias"}[mask_dtype]]


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "float64 tensors"])
def test_autocast_gives_the_answer_and_dtype_of_eager_autocast(where, kind):
    mask = {"bool": keep(5, 7), "float": torch.randn(5, 7)}.get(kind)
    qkv = randn(Q, K, K, dtype=torch.float64 if "64" in kind else torch.float32)

    def run(q, k, v):
        return sdpa(q @ q.mT @ q, k, v, mask)

    def run_inside(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return run(q, k, v)

    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        assert len(masks(compiled_sites(run if where == "around" else run_inside, *qkv))) == 1


def test_the_result_may_be_changed_in_place_beside_its_aliases():
    def run(q, k, v):
        out = sdpa(q, k, v, torch.ones(5, 7))
        out.contiguous().add_(1)
        return out

    compiled_sites(run, *randn(Q, K, K))


# ---------------------------------------------------------------- what is left to torch, and why


def dropout(q, k, v):
    torch.manual_seed(0)
    return sdpa(q, k, v, dropout_p=0.5).sum() * 0


REFUSED = {
    "dropout_p = 0.5: the canonical op has no dropout": (dropout, (Q, K, K)),
    "inside a torch.func transform (vmap, grad, jvp)": (lambda q, k, v: torch.vmap(sdpa)(q, k, v), (Q, K, K)),
    "D = 0: the default scale is infinite": (lambda q, k, v: sdpa(q, k, v), ((2, 4, 5, 0), (2, 4, 7, 0), K)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_canonical_op_cannot_say_runs_as_torch_and_is_listed_with_its_reason(reason):
    function, shapes = REFUSED[reason]
    (found,) = reasons(compiled_sites(function, *randn(*shapes)))
    assert found.startswith(reason)


def test_attention_on_the_meta_device_is_captured_so_that_a_model_is_explained_without_weights():
    q = torch.randn(Q, device="meta")
    report = sgl_npu.explain(lambda q: sdpa(q, q, q), q.bfloat16(), options={"platform": "npu"})
    assert [site.op for site in report.sites] == ["npu.npu_fused_infer_attention_score"]


def test_attention_written_by_hand_is_left_alone_in_training_and_listed_with_the_reason():
    def attend(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * 0.3 + 1.0, dim=-1).to(q.dtype) @ v

    q = torch.randn(Q, requires_grad=True)
    torch.compile(attend, backend="sgl_npu", options={"inner": "eager"})(q, q, q)
    (site,) = sgl_npu.reports()[-1].sites
    assert not site.fused and site.refusals == [
        (
            "capture",
            "written out by hand in a graph that is differentiated: matched in inference graphs alone, as under "
            "torch.no_grad()",
        )
    ]


def test_a_softmax_that_is_no_attention_is_not_listed():
    def route(x, gate, experts):
        return (torch.softmax(x @ gate, dim=-1).unsqueeze(-1) * experts).sum(1)

    torch.compile(route, backend="sgl_npu", options={"inner": "eager"})(
        torch.randn(3, 4), torch.randn(4, 2), torch.randn(3, 2, 4)
    )
    assert sgl_npu.reports()[-1].sites == []


def test_nested_tensors_run_as_torch():
    nested = torch.nested.nested_tensor(randn((3, 2, 8), (5, 2, 8)), layout=torch.jagged).transpose(1, 2)
    assert not any(site.fused for site in compiled_sites(lambda q: sdpa(q, q, q).values(), nested))


@pytest.mark.parametrize("grouped", [False, True])
def test_bad_head_counts_are_the_error_of_eager(grouped):
    def run(q, k, v):
        return sdpa(q, k, v, enable_gqa=grouped)

    qkv = randn(Q, (2, 3, 7, 8), (2, 3, 7, 8))
    with pytest.raises(RuntimeError):
        run(*qkv)
    with pytest.raises(RuntimeError, match="divide the number of heads" if grouped else "broadcast"):
        torch.compile(run, backend="sgl_npu", options={"inner": "eager"})(*qkv)


def test_attention_sdpa_leaves_the_call_alone():
    before = len(sgl_npu.reports())
    qkv = randn(Q, K, K)
    run = torch.compile(
        lambda q, k, v: sdpa(q, k, v), backend="sgl_npu", options={"inner": "eager", "attention": "sdpa"}
    )
    torch.testing.assert_close(run(*qkv), sdpa(*qkv))
    assert not any(site.fused for report in sgl_npu.reports()[before:] for site in report.sites)


@pytest.mark.slow
def test_flex_attention_is_listed_as_fused_and_left_to_torch():
    sites = compiled_sites(lambda q, k, v: flex_attention(q, k, v), *randn(*[(1, 2, 128, 16)] * 3), inner="inductor")
    assert [(site.op, site.fused) for site in sites] == [("flex_attention", True)]
