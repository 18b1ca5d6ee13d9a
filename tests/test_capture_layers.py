"""Attention of torch.nn layers, in nested graphs and in training, against eager."""

import math

import pytest
import torch
import torch.nn.functional as F
from captured_sites import FP32, compiled_sites, masks, randn, reasons
from torch import nn
from torch.utils.checkpoint import checkpoint

import sgl_npu

sdpa = F.scaled_dot_product_attention
Q, K = (2, 4, 5, 8), (2, 4, 7, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


# ---------------------------------------------------------------- nested graphs


def test_attention_in_a_checkpointed_region_is_fused_forward_and_backward():
    q, k, v = (x.requires_grad_() for x in randn(Q, K, K))

    def run(q, k, v):
        return checkpoint(lambda q, k, v: sdpa(q.sin(), k, v, is_causal=True).sin(), q, k, v, use_reentrant=False)

    assert masks(compiled_sites(run, q, k, v)) == ["causal"]
    expected = torch.autograd.grad(run(q, k, v).sum(), (q, k, v))
    compiled = torch.compile(run, backend="sgl_npu", options={"inner": "eager"})
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)), expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_attention_in_the_branches_of_a_cond_is_two_sites_with_the_answer_of_eager(sign):
    def run(sign, q, k, v):
        return torch.cond(
            sign > 0,
            lambda q, k, v: sdpa(q, k, v, is_causal=True).sin(),
            lambda q, k, v: sdpa(q, k, v).cos(),
            (q, k, v),
        )

    assert len(compiled_sites(run, torch.tensor(sign), *randn(Q, K, K))) == 2


# ---------------------------------------------------------------- torch.nn layers

PADDING = torch.zeros(3, 5, dtype=torch.bool)
PADDING[1, 3:] = True
FUTURE = torch.ones(5, 5, dtype=torch.bool).triu(1)
MHA = {
    "plain": ({}, "full"),
    "padding": ({"key_padding_mask": PADDING}, "tensor"),
    "bool mask": ({"attn_mask": FUTURE}, "tensor"),
    "float mask": ({"attn_mask": torch.zeros(5, 5).masked_fill(FUTURE, -math.inf)}, "full + bias"),
    "mask per head": ({"attn_mask": FUTURE.repeat(12, 1, 1)}, "tensor"),
    "padding and mask": ({"key_padding_mask": PADDING, "attn_mask": FUTURE}, "tensor"),
    "is_causal": ({"attn_mask": FUTURE, "is_causal": True}, "causal"),
    "kdim, vdim": ({"key": torch.randn(3, 4, 6), "value": torch.randn(3, 4, 10)}, "full"),
    "unbatched": ({"query": torch.randn(5, 16)}, "full"),
    "extra keys": ({}, "full"),
}


@pytest.fixture(params=[True, False], ids=["fast path", "slow path"])
def fast_path(request):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield request.param
    torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
@pytest.mark.parametrize("case", MHA)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_is_one_fused_site(fast_path, case, batch_first):
    arguments, mask = MHA[case]
    arguments = dict(arguments)
    query = arguments.pop("query", torch.randn(3, 5, 16))
    key, value = arguments.pop("key", query), arguments.pop("value", query)
    if not batch_first and query.dim() == 3:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    extra = case == "extra keys"
    model = nn.MultiheadAttention(
        16,
        4,
        kdim=key.size(-1),
        vdim=value.size(-1),
        batch_first=batch_first,
        add_bias_kv=extra,
        add_zero_attn=extra,
    ).eval()
    sites = compiled_sites(lambda q, k, v: model(q, k, v, need_weights=False, **arguments)[0], query, key, value)
    assert masks(sites) == [mask] and sites[0].spelling == "nn.MultiheadAttention"


@pytest.mark.parametrize("average", [True, False])
def test_need_weights_is_left_to_torch_with_its_reason(average):
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    sites = compiled_sites(lambda x: model(x, x, x, average_attn_weights=average), torch.randn(3, 5, 16))
    assert not any(site.fused for site in sites)
    assert "need_weights=True: torch computes the probabilities by hand" in str(sites[0].refusals)


def test_weights_that_are_asked_for_and_thrown_away_do_not_stop_the_match():
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval().requires_grad_(False)
    (site,) = compiled_sites(lambda x: model(x, x, x)[0], torch.randn(3, 5, 16))
    assert site.fused and site.spelling == "nn.MultiheadAttention"


LAYER = {
    "plain": ({}, "full", "full"),
    "padding": ({"src_key_padding_mask": PADDING}, "tensor", "tensor"),
    "mask": ({"src_mask": FUTURE}, "tensor", "tensor"),
    "float mask": ({"src_mask": torch.zeros(5, 5).masked_fill(FUTURE, -math.inf)}, "tensor", "full + bias"),
    "both": ({"src_mask": FUTURE, "src_key_padding_mask": PADDING}, "tensor", "tensor"),
    "is_causal": ({"src_mask": FUTURE, "is_causal": True}, "tensor", "causal"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", LAYER)
@pytest.mark.parametrize(("norm_first", "activation"), [(True, "gelu"), (False, "relu")])
def test_a_transformer_encoder_layer_is_one_fused_site(fast_path, case, norm_first, activation):
    arguments, fast_mask, slow_mask = LAYER[case]
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation=activation, batch_first=True, norm_first=norm_first).eval()
    sites = compiled_sites(lambda x: layer(x, **arguments), torch.randn(3, 5, 16))
    assert masks(sites) == [fast_mask if fast_path else slow_mask]


@torch.no_grad()
def test_every_layer_of_a_transformer_encoder_is_a_site(fast_path):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    sites = compiled_sites(lambda x: model(x, src_key_padding_mask=PADDING), torch.randn(3, 5, 16))
    assert masks(sites) == ["tensor"] * 3
    assert [site.module for site in sites] == [site.module for site in sorted(sites, key=lambda site: site.module)]


@torch.no_grad()
def test_a_transformer_decoder_layer_is_a_causal_and_a_cross_site(fast_path):
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True).eval()

    def run(x, memory):
        return layer(x, memory, tgt_mask=FUTURE, tgt_is_causal=True, memory_key_padding_mask=PADDING)

    assert masks(compiled_sites(run, *randn((3, 5, 16), (3, 5, 16)))) == ["causal", "tensor"]


# ---------------------------------------------------------------- training


def assert_same_gradients(function, leaves, tolerance=FP32, inner="eager"):
    expected = torch.autograd.grad(function(*leaves).float().sin().sum(), leaves)
    compiled = torch.compile(function, backend="sgl_npu", options={"inner": inner})
    got = torch.autograd.grad(compiled(*leaves).float().sin().sum(), leaves)
    torch.testing.assert_close(got, expected, **tolerance)
    return sgl_npu.reports()[-1].sites


HOLES = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
HOLES[0, 0, 2] = False
TRAINED = {
    "full": ((Q, K, K), lambda q, k, v: sdpa(q, k, v)),
    "causal": ((Q, K, K), lambda q, k, v: sdpa(q, k, v, is_causal=True)),
    "gqa": ((Q, (2, 2, 7, 8), (2, 2, 7, 8)), lambda q, k, v: sdpa(q, k, v, enable_gqa=True, scale=0.5)),
    "one head for all": ((Q, (2, 1, 7, 8), (1, 1, 7, 8)), lambda q, k, v: sdpa(q, k, v)),
    "mask with empty rows": ((Q, K, K), lambda q, k, v: sdpa(q, k, v, HOLES)),
    "bias": ((Q, K, K, (2, 4, 5, 7)), lambda q, k, v, b: sdpa(q, k, v, b)),
    "bias broadcast": ((Q, K, K, (4, 1, 7)), lambda q, k, v, b: sdpa(q, k, v, b)),
    "bias with empty rows": (
        (Q, K, K, (5, 7)),
        lambda q, k, v, b: sdpa(q, k, v, b.masked_fill(~HOLES, -math.inf)),
    ),
    "Dv unlike D": ((Q, K, (2, 4, 7, 6)), lambda q, k, v: sdpa(q, k, v, is_causal=True)),
    "5-D": (((2, 1, 4, 5, 8), (1, 3, 4, 7, 8), (2, 3, 4, 7, 8)), lambda q, k, v: sdpa(q, k, v)),
}


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_eager(case, dtype):
    shapes, function = TRAINED[case]
    leaves = [x.requires_grad_() for x in randn(*shapes, dtype=dtype)]
    sites = assert_same_gradients(function, leaves, FP32 if dtype == torch.float32 else {"atol": 4e-2, "rtol": 4e-2})
    assert len(sites) == 1 and sites[0].backward


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED)
def test_gradients_through_inductor_are_those_of_eager(case):
    shapes, function = TRAINED[case]
    assert_same_gradients(function, [x.requires_grad_() for x in randn(*shapes)], inner="inductor")


def test_a_layer_in_training_is_fused_without_dropout():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    leaves = [torch.randn(3, 5, 16, requires_grad=True)]
    assert masks(assert_same_gradients(lambda x: layer(x, src_mask=FUTURE), leaves)) == ["tensor"]
    parameters = list(layer.parameters())
    x = leaves[0].detach()
    compiled = torch.compile(layer, backend="sgl_npu", options={"inner": "eager"})
    expected = torch.autograd.grad(layer(x).sin().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sin().sum(), parameters), expected, **FP32)


def test_a_layer_with_dropout_trains_as_torch_and_says_why():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True)
    x = torch.randn(3, 5, 16, requires_grad=True)
    torch.compile(layer, backend="sgl_npu", options={"inner": "eager"})(x).sum().backward()
    assert x.grad.isfinite().all()
    (reason,) = reasons(sgl_npu.reports()[-1].sites)
    assert reason.startswith("dropout_p = 0.3")
