"""Masks that layers make alike from the same tensors are made once."""

import pytest
import torch
from compiled_report import compile_for, compiled, count
from torch import nn

import sgl_npu

LAYERS, SIZE, HEADS = 3, 32, 4


class Layer(nn.Module):
    """Causal and padded, or with a bias, each layer for itself."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.project, self.biased = nn.Linear(SIZE, 3 * SIZE), biased

    def forward(self, x, padding, bias):
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
        if self.biased:
            scores = scores + torch.tanh(bias)[None, :, : x.size(1), : x.size(1)]
        causal = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
        scores = scores.masked_fill(~(causal & padding[:, None, None, :]), -torch.inf)
        return x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(biased) for _ in range(LAYERS))
        self.bias = nn.Parameter(torch.randn(HEADS, 96, 96))

    def forward(self, x, padding):
        for layer in self.layers:
            x = layer(x, padding, self.bias)
        return x


def inputs(length=20, dtype=torch.float32):
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, length - 4 :] = False
    return torch.randn(2, length, SIZE, dtype=dtype), padding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mask_of_the_kernels_is_made_once(dtype):
    (report,) = compiled(Model().to(dtype), *inputs(dtype=dtype))
    assert report.fused == LAYERS and count(report, "aten.bitwise_not") == 1


@pytest.mark.parametrize("platform", ["cpu", "npu"])
def test_a_bias_is_made_once(platform):
    (report,) = compiled(Model(biased=True), *inputs(), platform=platform)
    assert report.fused == LAYERS and count(report, "aten.tanh") == 1


def test_one_graph_serves_several_lengths():
    model, before = Model(biased=True), len(sgl_npu.reports())
    function = compile_for(model, dynamic=True)
    for length in (20, 33, 64):
        given = inputs(length)
        with torch.no_grad():
            torch.testing.assert_close(function(*given), model(*given), atol=2e-5, rtol=2e-5)
    (report,) = sgl_npu.reports()[before:]
    assert count(report, "aten.tanh") == 1


def test_masks_of_different_tensors_stay_apart():
    one, other = nn.ModuleList([Layer(False), Layer(False)])

    def two(x, padding, another):
        return other(one(x, padding, None), another, None)

    x, padding = inputs()
    (report,) = compiled(two, x, padding, padding.roll(7, 1))
    assert report.fused == 2 and count(report, "aten.bitwise_not") == 2


def test_masks_that_the_caller_gets_stay_two_tensors():
    first, second = Layer(False), Layer(False)

    def given_out(x, padding):
        one, other = (padding.float() - 1).mul(9)[:, None], (padding.float() - 1).mul(9)[:, None]
        y = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=one)
        return nn.functional.scaled_dot_product_attention(y, x, x, attn_mask=other), one, other, first, second

    function = compile_for(given_out, platform="cpu")
    with torch.no_grad():
        _, one, other, *_ = function(*inputs())
    assert one.data_ptr() != other.data_ptr()


class Random(nn.Module):
    """Each layer drops scores of its own choice, as head masks of training do."""

    def forward(self, x):
        for _ in range(2):
            keep = torch.rand(1, x.size(1), x.size(1)) > 0.5
            x = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=keep | torch.eye(x.size(1)).bool())
        return x


def test_random_masks_stay_apart():
    x = torch.randn(2, 16, 8)
    before = len(sgl_npu.reports())
    with torch.no_grad():
        compile_for(Random(), platform="cpu")(x)
    assert count(sgl_npu.reports()[before:][0], "aten.rand") == 2


def test_copies_of_masks_that_the_caller_gets_stay_two_tensors():
    def given_out(x, padding):
        one, other = ((padding.float() - 1).mul(9)[:, None] for _ in range(2))
        y = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=one)
        return nn.functional.scaled_dot_product_attention(y, x, x, attn_mask=other), one.clone(), other.clone()

    function = compile_for(given_out, platform="cpu", inner="inductor")
    with torch.no_grad():
        _, one, other = function(*inputs())
    other_before = other.clone()
    one.fill_(7)
    assert torch.equal(other, other_before)


@torch.library.custom_op("sgl_npu_tests::random_mask", mutates_args=())
def random_mask(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape) > 0.4


random_mask.register_fake(lambda x: torch.empty_like(x, dtype=torch.bool))


def test_ops_of_others_may_be_random_without_saying_so():
    def two(x):
        for _ in range(2):
            x = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=random_mask(x @ x.mT))
        return x

    x, before = torch.randn(2, 16, 8), len(sgl_npu.reports())
    with torch.no_grad():
        compile_for(two, platform="cpu")(x)
    assert count(sgl_npu.reports()[before], "sgl_npu_tests.random_mask") == 2
