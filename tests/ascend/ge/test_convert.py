"""torchair's conversion to GE graphs on the stand-in: every node converts, then the FX graph runs."""

import torch
import torchair
from stand_in import ge
from torchair.configs.compiler_config import CompilerConfig


def test_a_function_converts_and_equals_the_cpu():
    weight, x = torch.randn(24, 24), torch.randn(3, 24)

    def function(weight, x):
        return torch.nn.functional.silu(x @ weight)

    config = CompilerConfig()
    config.debug.run_eagerly = True
    compiled = torch.compile(function, backend=torchair.get_npu_backend(compiler_config=config), fullgraph=True)
    with ge.converted() as graphs:
        out = compiled(weight.to("npu"), x.to("npu"))
    (graph,) = graphs
    found = ge.ops(graph)
    assert found == {"Data": 2, "MatMul": 1, "Swish": 1, "NetOutput": 1}, found
    assert out.device == torch.device("npu:0")
    assert torch.equal(out.cpu(), function(weight, x))
