"""Attention by hand beyond the plain formula: exp and sum, guards, gates, folded heads, masks by arithmetic."""

import math

import pytest
import torch
from compiled_report import compile_for, compiled, only_site
from handwritten import MIN, B, D, H, S, inputs

import sgl_npu


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scores_of(q, k):
    return q @ k.transpose(-2, -1) * 0.25


def causal():
    return torch.arange(S) <= torch.arange(S)[:, None]


def padding():
    """The first five keys of the last sequence are padding: its first queries have no key under a causal mask."""
    keep = torch.ones(B, 1, 1, S, dtype=torch.bool)
    keep[-1, ..., :5] = False
    return keep


def exponentials(q, k, v):
    scores = scores_of(q, k)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def exponentials_with_bounded_shift(q, k, v):
    scores = scores_of(q, k)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=-1e4))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def exponentials_without_shift(q, k, v):
    weights = scores_of(q, k).float().exp()
    return (weights * (1 / weights.sum(dim=-1, keepdim=True))).to(v.dtype) @ v


def divided_after_the_product(q, k, v):
    scores = scores_of(q, k)
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return (weights @ v) / weights.sum(-1)[..., None]


def nan_to_num(q, k, v):
    scores = scores_of(q, k).masked_fill(~padding(), -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def nan_guard(q, k, v):
    p = scores_of(q, k).masked_fill(~padding(), -math.inf).softmax(-1)
    return torch.where(torch.isnan(p), 0.0, p) @ v


def row_guard(q, k, v):
    keep = (padding() & causal()).expand(B, 1, S, S)
    p = torch.where(keep, scores_of(q, k), -math.inf).softmax(-1)
    return torch.where(keep.any(-1, keepdim=True), p, 0.0) @ v


def masked_twice(q, k, v):
    gone = ~(padding() & causal())
    return scores_of(q, k).masked_fill(gone, -1e9).softmax(-1).masked_fill(gone, 0.0) @ v


def head_mask(q, k, v):
    return (scores_of(q, k).softmax(-1) * torch.linspace(0, 1, H, dtype=q.dtype).view(1, -1, 1, 1)) @ v


def sink_by_logsumexp(q, k, v):
    scores = scores_of(q, k).masked_fill(~causal(), -math.inf)
    share = torch.sigmoid(
        torch.logsumexp(scores, -1, keepdim=True) - torch.linspace(-1, 1, H, dtype=q.dtype).view(-1, 1, 1)
    )
    return (scores.softmax(-1) @ v) * share


def sink_of_each_query(q, k, v):
    columns = torch.cat([scores_of(q, k), q.mean(-1, keepdim=True)], -1)
    return columns.softmax(-1, dtype=torch.float32)[..., :-1].to(q.dtype) @ v


def transposed_product(q, k, v):
    return (k @ q.mT * 0.25).transpose(-2, -1).softmax(-1) @ v


def grouped_einsum(q, k, v):
    k, v = k[:, :2], v[:, :2]
    scores = torch.einsum("bgnsd,bgtd->bgnst", q.unflatten(1, (2, 2)), k) * 0.25
    p = scores.masked_fill(~causal(), -math.inf).softmax(-1)
    return torch.einsum("bgnst,bgtd->bsgnd", p, v).flatten(2)


def grouped_einsum_softmax_over_all_heads(q, k, v):
    k, v = k[:, :2], v[:, :2]
    scores = torch.einsum("bgnsd,bgtd->bgnst", q.unflatten(1, (2, 2)), k).flatten(1, 2) * 0.25
    p = scores.masked_fill(~causal(), -math.inf).softmax(-1)
    return torch.einsum("bgnst,bgtd->bgnsd", p.unflatten(1, (2, 2)), v).flatten(1, 2)


def one_key_head(q, k, v):
    k, v = k[:, 0], v[:, 0]
    scores = torch.einsum("b h i d, b j d -> b h i j", q * 0.25, k)
    scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.finfo(scores.dtype).max)
    return torch.einsum("b h i j, b j d -> b h i d", scores.softmax(-1), v).transpose(1, 2).flatten(2)


def positions_before_heads(q, k, v):
    rows, k, v = q.transpose(1, 2).flatten(1, 2), k[:, 0], v[:, 0]
    p = (rows @ k.mT * 0.25).view(B, S, H, S).softmax(-1)
    return (p.view(B, -1, S) @ v).view(B, S, -1)


def multiplied_mask(q, k, v):
    keep = causal().to(q.dtype)
    return (scores_of(q, k) * keep + -1e4 * (1 - keep)).softmax(-1) @ v


def mask_by_arithmetic(q, k, v):
    return (scores_of(q, k) + (1.0 - causal().to(q.dtype)) * torch.finfo(q.dtype).min).softmax(-1) @ v


def low_but_not_lowest(q, k, v):
    return torch.where((torch.arange(S)[:, None] - torch.arange(S)).abs() <= 8, scores_of(q, k), -1e4).softmax(-1) @ v


MASKS = {
    exponentials: "full",
    exponentials_with_bounded_shift: "full",
    exponentials_without_shift: "full",
    divided_after_the_product: "full",
    nan_to_num: "tensor",
    nan_guard: "tensor",
    row_guard: "causal & tensor",
    masked_twice: "causal & tensor",
    head_mask: "full",
    sink_by_logsumexp: "causal",
    sink_of_each_query: "full",
    transposed_product: "full",
    grouped_einsum: "causal",
    grouped_einsum_softmax_over_all_heads: "causal",
    one_key_head: "causal",
    positions_before_heads: "full",
    multiplied_mask: "causal",
    mask_by_arithmetic: "causal",
    low_but_not_lowest: "band(-8, 8)",
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", MASKS, ids=lambda f: f.__name__)
def test_every_spelling_is_one_site_with_its_mask(spelling, dynamic):
    tensors = inputs()
    for x in tensors:
        torch._dynamo.mark_static(x, [1, 2, 3] if dynamic else [])
    site = only_site(compiled(spelling, *tensors, platform="cpu", dynamic=dynamic))
    assert site.fused and site.mask == MASKS[spelling], site


@pytest.mark.parametrize("spelling", MASKS, ids=lambda f: f.__name__)
def test_every_spelling_runs_on_an_npu_s_ops(spelling):
    site = only_site(compiled(spelling, *inputs(dtype=torch.bfloat16), platform="npu"))
    assert site.fused, site


def filled_with(number):
    return lambda q, k, v: scores_of(q, k).masked_fill(~(padding() & causal()), number).softmax(-1) @ v


def added(q, k, v):
    mask = torch.where(padding() & causal(), 0.0, MIN)
    return (scores_of(q, k) + mask).softmax(-1) @ v


def filled_and_added(q, k, v):
    scores = torch.where(causal(), scores_of(q, k), MIN)
    return (scores + torch.where(padding(), 0.0, MIN)).softmax(-1) @ v


@pytest.mark.parametrize("platform", ["cpu", "npu"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("formula", [filled_with(MIN), filled_with(-1e9), added, filled_and_added])
def test_a_row_without_keys_gets_the_average_that_the_formula_gives(formula, dynamic, platform):
    tensors = inputs()
    for x in tensors:
        torch._dynamo.mark_static(x, [1, 2, 3] if dynamic else [])
    assert only_site(compiled(formula, *tensors, platform=platform, dynamic=dynamic)).kernel


@pytest.mark.parametrize("platform", ["cpu", "npu"])
@pytest.mark.parametrize("upcast", [None, torch.float32])
def test_in_float16_a_score_plus_the_lowest_number_is_that_number(upcast, platform):
    def formula(q, k, v):
        mask = torch.where(padding() & causal(), 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        return (scores_of(q, k) + mask).softmax(-1, dtype=upcast).to(v.dtype) @ v

    site = only_site(compiled(formula, *inputs(dtype=torch.float16), platform=platform))
    assert site.kernel and "bias" not in site.mask, site


def test_without_preserve_empty_rows_such_a_row_is_zero_and_all_others_are_the_same():
    q, k, v = inputs()
    options = {"inner": "eager", "strict": True, "preserve_empty_rows": False}
    got = torch.compile(filled_and_added, backend="sgl_npu", options=options)(q, k, v)
    wanted = filled_and_added(q, k, v)
    assert (got[-1, :, :5] == 0).all() and sgl_npu.reports()[-1].sites[0].mask == "causal & tensor"
    torch.testing.assert_close(got[:-1], wanted[:-1], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got[-1, :, 5:], wanted[-1, :, 5:], atol=2e-5, rtol=2e-5)


def test_nobody_pays_for_empty_rows_where_every_row_has_a_key():
    (report,) = compiled(mask_by_arithmetic, *inputs(), platform="cpu")
    assert "aten.mean" not in report.graph and not report.sites[0].lse_used


class Capped(torch.nn.Module):
    """Gemma 2's attention: under dynamic=True its numbers are inputs of the graph."""

    def __init__(self, cap):
        super().__init__()
        self.cap, self.scale = cap, 0.25

    def forward(self, q, k, v):
        scores = torch.tanh(q @ k.mT * self.scale / self.cap) * self.cap
        return scores.masked_fill(~(torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]), MIN).softmax(-1) @ v


def test_a_softcap_that_is_a_number_of_the_module_is_a_constant_in_dynamic_graphs_too():
    model, before = Capped(3.0), len(sgl_npu.reports())
    run = compile_for(model, "npu", dynamic=True)
    for length in (S, 7, 40):
        tensors = inputs(rows=length, keys=length)
        torch.testing.assert_close(run(*tensors), model(*tensors), atol=2e-5, rtol=2e-5)
    site = only_site(sgl_npu.reports()[before:])
    assert site.kernel and site.mask == "causal", site
    model.cap = 1.0
    torch.testing.assert_close(run(*tensors), model(*tensors), atol=2e-5, rtol=2e-5)


def test_windows_have_sizes_that_are_products_of_several_symbols():
    def swin(x, weight, mask):
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 4, 4, width // 4, 4, channels).transpose(2, 3).reshape(-1, 16, channels)
        q, k, v = (x @ weight).unflatten(-1, (3, 2, D)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = scores_of(q, k).view(batch, -1, 2, 16, 16) + mask[:, None]
        return scores.view(-1, 2, 16, 16).softmax(-1) @ v

    weight, before = torch.randn(8, 96) / 3, len(sgl_npu.reports())
    run = compile_for(swin, "cpu", dynamic=True)
    for batch, rows, columns in ((2, 3, 4), (3, 5, 2), (4, 2, 6)):
        x, mask = torch.randn(batch, 4 * rows, 4 * columns, 8), torch.randn(rows * columns, 16, 16)
        for tensor, dim in ((x, 3), (mask, 1), (mask, 2)):
            torch._dynamo.mark_static(tensor, dim)
        with torch.no_grad():
            torch.testing.assert_close(run(x, weight, mask), swin(x, weight, mask), atol=2e-5, rtol=2e-5)
    sites = [site for report in sgl_npu.reports()[before:] for site in report.sites]
    assert all(site.fused and site.mask == "full + bias" for site in sites) and len(sites) < 3, sites
