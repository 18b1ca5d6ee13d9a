"""npugraph_ex, torch_npu's compiler to ACL graphs, on the stand-in: everything but the capture itself."""

import torch


def test_a_compiled_function_equals_the_cpu():
    first, second = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24)

    def layers(x):
        return second(torch.nn.functional.silu(first(x)))

    x = torch.randn(3, 24)
    expected = layers(x)
    first.to("npu"), second.to("npu")
    with torch.no_grad():
        out = torch.compile(layers, backend="npugraph_ex", fullgraph=True, options={"force_eager": True})(x.to("npu"))
    assert out.device == torch.device("npu:0")
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0)
