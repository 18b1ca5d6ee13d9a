"""Gradients on an NPU are those of eager on the CPU: what is opened for the passes is differentiated as it was."""

import both_devices
import handwritten
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import sgl_npu


def called(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("function", [called, handwritten.upcast, handwritten.interleaved], ids=lambda f: f.__name__)
def test_gradients_are_those_of_eager_for_all_lengths(function):
    torch._dynamo.reset()
    torch.manual_seed(0)
    run = torch.compile(function, backend="sgl_npu", options=both_devices.OPTIONS)
    for length in (24, 17):
        on_cpu = [x.requires_grad_() for x in handwritten.inputs(rows=length, keys=length)]
        on_npu = [x.detach().to(both_devices.NPU).requires_grad_() for x in on_cpu]
        for x in on_npu:
            torch._dynamo.mark_dynamic(x, 2)
        function(*on_cpu).square().sum().backward()
        run(*on_npu).square().sum().backward()
        for x, y in zip(on_npu, on_cpu, strict=True):
            torch.testing.assert_close(x.grad.cpu(), y.grad, atol=1e-4, rtol=1e-4)


def test_gradients_of_flex_attention():
    """torch has none for the CPU."""

    def causal(b, h, i, j):
        return i >= j

    def run(q, k, v):
        block_mask = create_block_mask(causal, None, None, q.size(2), k.size(2), device=q.device)
        return flex_attention(q, k, v, block_mask=block_mask)

    on_cpu = [x.requires_grad_() for x in handwritten.inputs(rows=24, keys=24)]
    on_npu = [x.detach().to(both_devices.NPU).requires_grad_() for x in on_cpu]
    called(*on_cpu).square().sum().backward()
    torch._dynamo.reset()
    torch.compile(run, backend="sgl_npu", options=both_devices.OPTIONS)(*on_npu).square().sum().backward()
    (site,) = sgl_npu.reports()[-1].sites
    assert (site.spelling, site.mask, site.fused) == ("flex_attention", "causal", True), site.refusals
    for x, y in zip(on_npu, on_cpu, strict=True):
        torch.testing.assert_close(x.grad.cpu(), y.grad, atol=1e-4, rtol=1e-4)


def test_the_largest_scores_of_flex_attention_are_left_to_torch():
    """torch has none on the CPU either."""

    def run(q, k, v):
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(max_scores=True))
        return out, aux.max_scores

    tensors = [x.to(both_devices.NPU) for x in handwritten.inputs(rows=24, keys=24)]
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(run, backend="sgl_npu", options=both_devices.OPTIONS)(*tensors)[1]
    (site,) = sgl_npu.reports()[-1].sites
    assert not site.kernel and "largest scores" in dict(site.refusals)["capture"]
    query, key = (x.cpu() for x in tensors[:2])
    expected = (query @ key.transpose(-1, -2)).amax(-1) * query.size(-1) ** -0.5
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
