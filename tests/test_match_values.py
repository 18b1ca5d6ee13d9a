"""Formulas that are nearly attention, or whose masks are nearly masks: matched or refused, the values are eager's."""

import math

import pytest
import torch
from compiled_report import compiled

inf = math.inf


def tensors():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 6, 8) for _ in range(3)]


def causal():
    return torch.ones(6, 6, dtype=torch.bool).tril()


def holes():
    """One query of the first sequence keeps no key."""
    keep = torch.arange(72).view(2, 1, 6, 6) * 7 % 5 > 1
    keep[0, :, 1] = False
    return keep


def padding():
    keep = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    keep[0, ..., 3:] = False
    keep[1] = False
    return keep


def bias():
    return torch.linspace(-2, 2, 108).view(3, 6, 6)


def exponentials(q, k):
    return (q @ k.mT).exp()


CASES = {
    "scores rounded to integers": lambda q, k, v: (q @ k.mT * 3).int().float().softmax(-1) @ v,
    "weights rounded": lambda q, k, v: (e := (1 + exponentials(q, k)).int()) / e.sum(-1, True) @ v,
    "their sum rounded": lambda q, k, v: (e := exponentials(q, k)) / e.sum(-1, True).int() @ v,
    "their sum in integers": lambda q, k, v: ((e := exponentials(q, k)) @ v) / e.sum(-1, True, dtype=torch.int64),
    "their product rounded": lambda q, k, v: ((e := exponentials(q, k)) @ v).int().float() / e.sum(-1, True),
    "a fill that its scale takes back": lambda q, k, v: ((q @ k.mT).masked_fill(~causal(), -1e4) / 1e4).softmax(-1) @ v,
    "an added fill that its scale takes back": lambda q, k, v: (
        ((q @ k.mT + torch.where(causal(), 0.0, -1e4)) / 1e4).softmax(-1) @ v
    ),
    "a bias over a fill": lambda q, k, v: ((q @ k.mT).masked_fill(~holes(), -1e4) + bias()).softmax(-1) @ v,
    "a bias over the lowest fill": lambda q, k, v: ((q @ k.mT).masked_fill(~holes(), -1e38) + bias()).softmax(-1) @ v,
    "a fill over a bias": lambda q, k, v: (q @ k.mT + bias()).masked_fill(~holes(), -1e4).softmax(-1) @ v,
    "a filled bias": lambda q, k, v: (q @ k.mT + bias().masked_fill(~holes(), -1e4)).softmax(-1) @ v,
    "a filled bias by where": lambda q, k, v: (q @ k.mT + torch.where(holes(), bias(), -1e4)).softmax(-1) @ v,
    "two fills": lambda q, k, v: (
        (q @ k.mT).masked_fill(~causal(), -1e4).masked_fill(~padding(), -1e4).softmax(-1) @ v
    ),
    "two different fills": lambda q, k, v: (
        (q @ k.mT).masked_fill(~causal(), -1e4).masked_fill(~padding(), -3e4).softmax(-1) @ v
    ),
    "-inf over a fill": lambda q, k, v: (
        (q @ k.mT).masked_fill(~padding(), -1e4).masked_fill(~causal(), -inf).softmax(-1) @ v
    ),
    "a fill over -inf": lambda q, k, v: (
        (q @ k.mT).masked_fill(~causal(), -inf).masked_fill(~padding(), -1e4).softmax(-1) @ v
    ),
    "a fill over an added one": lambda q, k, v: (
        (q @ k.mT + torch.where(causal(), 0.0, -1e4)).masked_fill(~holes(), -1e4).softmax(-1) @ v
    ),
    "an added one over a fill": lambda q, k, v: (
        ((q @ k.mT).masked_fill(~holes(), -1e4) + torch.where(causal(), 0.0, -1e4)).softmax(-1) @ v
    ),
    "an added lowest over a lowest": lambda q, k, v: (
        ((q @ k.mT).masked_fill(~holes(), -3e38) + torch.where(padding(), 0.0, -3e38)).softmax(-1) @ v
    ),
    "bytes that wrap around": lambda q, k, v: (q @ k.mT + (causal().byte() - 1) * 1e4).softmax(-1) @ v,
    "bytes that wrap around, as floats": lambda q, k, v: (
        (q @ k.mT + (causal().byte() - 1).to(q.dtype) * 1e4).softmax(-1) @ v
    ),
    "small integers that wrap around": lambda q, k, v: (
        (q @ k.mT + (1 - causal().to(torch.int8)) * -10000).softmax(-1) @ v
    ),
    "a fraction cut off": lambda q, k, v: (
        (q @ k.mT + ((1 - causal().int()) * -0.5).int() * 1e9).softmax(-1) @ v
    ),
    "two fills, one of them blanked again": lambda q, k, v: (
        (q @ k.mT).masked_fill(~causal(), -1e30).masked_fill(~holes(), -1e30).softmax(-1).masked_fill(~holes(), 0.0) @ v
    ),
    "repeated heads that are not groups": lambda q, k, v: (
        (q @ k[:, :1].repeat(1, 3, 1, 1).mT).softmax(-1) @ v[:, :1].repeat(1, 3, 1, 1)
    ),
}  # fmt: skip


def columns(x):
    """(H, S, S) numbers as a column beside the scores, were they per head."""
    return x.view(1, 3, 1, 1).expand(3, 3, 3, 1)


SQUARES = {
    "a sink per head": lambda q, k, v, s: torch.cat([q @ k.mT, columns(s)], -1).softmax(-1)[..., :3] @ v,
    "a sink per query": lambda q, k, v, s: (
        torch.cat([q @ k.mT, columns(s).transpose(1, 2)], -1).softmax(-1)[..., :3] @ v
    ),
    "a sink per sequence": lambda q, k, v, s: (
        torch.cat([q @ k.mT, columns(s).transpose(0, 1)], -1).softmax(-1)[..., :3] @ v
    ),
}


@pytest.mark.parametrize("formula", SQUARES.values(), ids=SQUARES)
def test_sizes_that_are_equal_do_not_make_dimensions_the_same(formula):
    compiled(formula, *(torch.randn(3, 3, 3, 8) for _ in range(3)), torch.randn(3), platform="cpu")


@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_lse_beside_a_softmax_whose_rows_may_be_averages(low):
    def attend(q, k, v):
        scores = (q @ k.mT).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(-1), low)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    compiled(attend, *tensors(), platform="cpu")


def test_no_keys_at_all_are_no_average():
    def attend(q, k, v):
        return (q @ k.mT).masked_fill(torch.ones(3, 0, dtype=torch.bool), -1e9).softmax(-1) @ v

    compiled(attend, torch.randn(2, 2, 3, 4), torch.randn(2, 2, 0, 4), torch.randn(2, 2, 0, 4), platform="cpu")


@pytest.mark.parametrize(("platform", "dynamic"), [("cpu", True), ("npu", False)])
@pytest.mark.parametrize("formula", CASES.values(), ids=CASES)
def test_the_answer_is_that_of_the_formula(formula, platform, dynamic):
    compiled(formula, *tensors(), platform=platform, dynamic=dynamic)
