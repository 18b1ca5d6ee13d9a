"""What looks like attention written by hand and is not, or cannot be replaced, is left alone and says why."""

import functools

import compiled_report
import pytest
import torch
import torch.nn.functional as F
from compiled_report import assert_same
from handwritten import inputs

import sgl_npu

compile_for = functools.partial(compiled_report.compile_for, formulas=True)

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


def head_mask(q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.arange(q.shape[1])[:, None, None]) @ v


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


def column_per_row(q, k, v):
    return torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], -1).softmax(-1)[..., :-1] @ v


def transposed_scores(q, k, v):
    return (k @ q.mT).transpose(-2, -1).softmax(-1) @ v


def heads_and_rows_mixed(q, k, v):
    return (q @ k.mT).transpose(1, 2).softmax(-1).transpose(1, 2).flatten(0, 1).unflatten(0, (2, 4)) @ v


def quotient(q, k, v):
    return (1.0 / (q @ k.mT + 100.0)).softmax(-1) @ v


REASONS = {
    other_dimension: "a softmax over dimension",
    transposed_probabilities: "the product does not sum over the dimension of the softmax",
    returned_probabilities: "the probabilities are used by",
    returned_scores: "the scores are used by",
    head_mask: "the probabilities are multiplied",
    dropout: "dropout of the probabilities",
    gated: "multiplied or divided by a tensor that differs from key to key",
    clamped: "the scores come from 'clamp'",
    half_filled: "filled with -10.0, not with a number that forbids a key",
    scaled_keys: "multiplied or divided by a tensor that differs from key to key",
    mask_under_negative_scale: "filled in before a scale that may be negative",
    bias_under_softcap: "a term is added inside the softcap",
    tanh_without_cap: "a tanh times -1.0: no softcap",
    two_columns: "not scores and one column of sinks",
    column_per_row: "is not one number per head",
    transposed_scores: "rows and keys are not the last dimensions",
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


def test_attention_of_channels_is_known_by_the_dynamic_size_that_it_sums_over():
    def channels(x):
        x = x.transpose(1, 2)
        return (x @ x.mT * 0.01).softmax(-1) @ x

    x = torch.randn(2, S, 16)
    torch._dynamo.mark_static(x, 2)
    with torch.no_grad():
        (record,) = records_of(channels, x, dynamic=True)
    assert not record.kernel and "channel attention" in record.refusals[0][1]
