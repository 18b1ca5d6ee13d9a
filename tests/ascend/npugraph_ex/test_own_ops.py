"""Our operators around sgl-kernel-npu go through npugraph_ex: one graph for every length, the CPU's numbers."""

import pytest
import torch
from package_op_cases import TENSORS, arguments, lengths, outputs
from stand_in import kernels

from sgl_npu.runtime.npu.kernel_package import KernelUnavailable
from sgl_npu.runtime.npu.package_ops import PACKAGE_OPS, ensure_package_ops

ensure_package_ops()
NAMES = pytest.mark.parametrize("name", PACKAGE_OPS)


@pytest.mark.parametrize("name", [name for name in PACKAGE_OPS if name != "split_qkv_rmsnorm_rope"])
def test_without_the_package_the_operator_says_what_to_install(name):
    """The first test: later ones give the operators kernels of their own. The one left out is its formula then."""
    tensors = [x.to("npu") for x in TENSORS[name](lengths(name)[0])]
    with pytest.raises(KernelUnavailable, match=f"{name}: none of .* is there; on an Ascend machine"):
        getattr(torch.ops.sgl_npu, name)(*arguments(name, tensors))


@NAMES
def test_one_graph_serves_every_length_and_equals_the_cpu(name):
    # The stand-in has no sgl-kernel-npu.
    kernels.give_kernel(f"sgl_npu::{name}", PACKAGE_OPS[name].cpu)
    torch._dynamo.reset()
    seen = []

    def run(*tensors):
        results = outputs(getattr(torch.ops.sgl_npu, name)(*arguments(name, tensors)))
        return tuple(x + 1 for x in results)

    def record(graph, inputs, config):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])

    options = {"force_eager": True, "post_grad_custom_pre_pass": record}
    compiled = torch.compile(run, backend="npugraph_ex", fullgraph=True, dynamic=True, options=options)
    for length in lengths(name):
        tensors = TENSORS[name](length)
        with torch.no_grad():
            results = compiled(*(x.to("npu") for x in tensors))
        for one, other in zip(results, run(*tensors), strict=True):
            assert one.device == torch.device("npu:0")
            assert torch.equal(one.cpu(), other)
    (targets,) = seen
    assert targets.count(getattr(torch.ops.sgl_npu, name).default) == 1
