"""Gradients on an NPU are those of eager on the CPU: what is opened for the passes is differentiated as it was."""

import both_devices
import handwritten
import pytest
import torch
import torch.nn.functional as F


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
