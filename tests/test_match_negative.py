"""What looks like attention written by hand and is not, or cannot be replaced, is left alone and says why."""

import compiled_report
import pytest
import torch
import torch.nn.functional as F
from compiled_report import assert_same
from handwritten import inputs

import sgl_npu

compile_for = compiled_report.compile_for

S = 24
LINE, TABLE = torch.linspace(-1, 1, S), torch.linspace(-1, 1, S * S).view(S, S)


def other_dimension(q, k, v):
    return F.softmax(q @ k.mT, dim=-2) @ v


def transposed_probabilities(q, k, v):
    return (q @ k.mT).softmax(-1).transpose(-2, -1) @ v


def returned_probabilities(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v, p


def returned_scores(q, k, v):
    scores = q @ k.mT * 0.25
    return scores.softmax(-1) @ v, scores


def key_mask(q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.linspace(0, 1, k.shape[2])) @ v


def dropout(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.5) @ v


def gated(q, k, v):
    return ((q @ k.mT) * torch.sigmoid(q @ k.mT)).softmax(-1) @ v


def clamped(q, k, v):
    return (q @ k.mT).clamp(min=0.0).softmax(-1) @ v


def half_filled(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.ones(S, S, dtype=torch.bool).tril(), -10.0)
    return scores.softmax(-1) @ v


def scaled_keys(q, k, v):
    return ((q @ k.mT) * LINE).softmax(-1) @ v


def mask_under_negative_scale(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.ones(S, S, dtype=torch.bool).tril(), -1e9)
    return (scores * -0.25).softmax(-1) @ v


def bias_under_softcap(q, k, v):
    return (5 * torch.tanh((q @ k.mT + TABLE) / 5)).softmax(-1) @ v


def tanh_without_cap(q, k, v):
    return (-1.0 * torch.tanh(q @ k.mT)).softmax(-1) @ v


def two_columns(q, k, v):
    column = torch.zeros(2, 4, S, 2)
    return torch.cat([q @ k.mT, column], -1).softmax(-1)[..., :-2] @ v


def another_mask_after_it(q, k, v):
    keep = torch.ones(S, S, dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1).masked_fill(keep.mT, 0.0) @ v


def probabilities_tested(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return torch.where(p.isnan(), 0.0, p) @ v, p.isnan().to(q.dtype)


def half_folded(q, k, v):
    p = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1)
    return p @ v


def exponentials_without_their_sum(q, k, v):
    weights = torch.exp(q @ k.mT)
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1.0)


def heads_and_rows_mixed(q, k, v):
    return (q @ k.mT).transpose(1, 2).softmax(-1).transpose(1, 2).flatten(0, 1).unflatten(0, (2, 4)) @ v


def quotient(q, k, v):
    return (1.0 / (q @ k.mT + 100.0)).softmax(-1) @ v


REASONS = {
    other_dimension: "a softmax over dimension",
    transposed_probabilities: "the product does not sum over the dimension of the softmax",
    returned_probabilities: "the probabilities are used by",
    returned_scores: "the scores are used by",
    key_mask: "the probabilities are multiplied",
    dropout: "dropout of the probabilities",
    gated: "multiplied or divided by a tensor that differs from key to key",
    clamped: "the scores come from 'clamp'",
    half_filled: "filled with -10.0, not with a number that forbids a key",
    scaled_keys: "multiplied or divided by a tensor that differs from key to key",
    mask_under_negative_scale: "filled in before a scale that may be negative",
    bias_under_softcap: "a term is added inside the softcap",
    tanh_without_cap: "a tanh times -1.0: no softcap",
    two_columns: "not scores and one column of sinks",
    another_mask_after_it: "masked by something that the scores were not masked by",
    probabilities_tested: "a test of the probabilities",
    half_folded: "heads are folded into the rows of one product and not of the other",
    heads_and_rows_mixed: "rows and keys are not the last dimensions",
    quotient: "the scores come from 'reciprocal'",
}


def records_of(function, *args, **settings):
    """The records of one compiled call, whose values are eager's."""
    before = len(sgl_npu.reports())
    torch.manual_seed(0)
    expected = function(*args)
    torch.manual_seed(0)
    assert_same(compile_for(function, "cpu", **settings)(*args), expected)
    return [site for report in sgl_npu.reports()[before:] for site in report.sites]


@pytest.mark.parametrize("function", REASONS, ids=lambda f: f.__name__)
def test_what_does_not_fit_is_refused_with_its_reason(function):
    with torch.no_grad():
        (record,) = records_of(function, *inputs())
    assert not record.kernel and not record.fused
    ((name, reason),) = record.refusals
    assert name == "match" and REASONS[function] in reason
    assert record.deepest.startswith("aten.") and "test_match_negative.py" in record.deepest


def test_linear_attention_has_no_softmax_over_scores_and_no_site():
    def linear(q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)

    with torch.no_grad():
        assert not any(record.kernel for record in records_of(linear, *inputs()))


def test_a_router_is_no_attention():
    def route(x, gate, experts):
        weights, chosen = (x @ gate).softmax(-1).topk(2)
        return (experts[chosen] * weights[..., None]).sum(1)

    with torch.no_grad():
        records = records_of(route, torch.randn(6, 8), torch.randn(8, 4), torch.randn(4, 8))
    assert not any(record.kernel for record in records)


def test_a_graph_that_is_differentiated_is_left_alone():
    q = torch.randn(2, 4, S, 16, requires_grad=True)
    (record,) = records_of(lambda q: (q @ q.mT).softmax(-1) @ q, q)
    assert not record.kernel and "inference graphs" in record.refusals[0][1]


def test_a_softmax_by_exponentials_that_is_left_alone_is_listed_too():
    def returned(q, k, v):
        weights = torch.exp(q @ k.mT)
        p = weights / weights.sum(-1, keepdim=True)
        return p @ v, p

    with torch.no_grad():
        (record,) = records_of(returned, *inputs())
    assert not record.kernel and "the probabilities are used by" in record.refusals[0][1]


def test_exponentials_that_are_divided_by_more_than_their_sum_are_no_softmax():
    with torch.no_grad():
        assert not any(record.kernel for record in records_of(exponentials_without_their_sum, *inputs()))


def channels_of_a_projection(x, weight):
    """XCiT's cross-covariance attention."""
    batch, length, _ = x.shape
    q, k, v = (x @ weight).view(batch, length, 3, 4, -1).permute(2, 0, 3, 4, 1).unbind(0)
    q, k = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
    return ((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)


def channels_of_a_convolution(x, weight):
    """Restormer's transposed attention."""
    q, k, v = torch.nn.functional.conv1d(x.mT, weight.mT.unsqueeze(-1)).unflatten(1, (3, 4, -1)).unbind(1)
    return ((q @ k.mT * 0.1).softmax(-1) @ v).flatten(1, 2)


@pytest.mark.parametrize("dynamic", [False, None])
@pytest.mark.parametrize("function", [channels_of_a_projection, channels_of_a_convolution], ids=lambda f: f.__name__)
def test_attention_of_channels_is_known_by_what_made_them(function, dynamic):
    x, weight = torch.randn(2, S, 16), torch.randn(16, 48)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        (record,) = records_of(function, x, weight, dynamic=dynamic)
    assert not record.kernel and "channel attention" in record.refusals[0][1]


def test_keys_that_are_projected_positions_are_no_channels():
    def linformer(x, weight, length_weight):
        q, k, v = (x @ weight).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = ((y.mT @ length_weight).mT for y in (k, v))
        return (q @ k.mT * 0.25).softmax(-1) @ v

    with torch.no_grad():
        (record,) = records_of(linformer, torch.randn(2, S, 16), torch.randn(16, 48) / 4, torch.randn(S, 5) / 5)
    assert record.kernel and record.key == ("2", "4", "5", "4")
