"""The models that are served on Ascend, compiled on the stand-in: how they are run and compared with the CPU."""

import torch
from torch.utils import _pytree as pytree

import sgl_npu
from benchmarks.ascend.models import MODELS

LENGTHS = (40, 56, 72, 88, 104, 120, 136, 152)  # unlike any other size: an equal one would specialise a graph
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def cases(*dtypes):
    """Every model in every dtype; what has two spellings of attention has the first in the first dtype, and so on."""
    for name, model in MODELS.items():
        for index, dtype in enumerate(dtypes):
            yield name, model.spellings[index % len(model.spellings)], dtype


def placed(inputs, dtype, device):
    def place(x):
        return x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x

    return pytree.tree_map(place, inputs)


def check(name, spelling, dtype, inner, inner_options, lengths):
    """One graph for all lengths, for one a graph of numbers; as on the CPU, every attention a FIA call: the report."""
    model = MODELS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reference, module = model.build(spelling).to(dtype), model.build(spelling).to(dtype).to("npu")
    options = {"inner": inner, "inner_options": inner_options, "strict": True}
    dynamic, before = len(lengths) > 1, len(sgl_npu.reports())
    compiled = torch.compile(module, backend="sgl_npu", dynamic=dynamic, options=options)
    for length in lengths:
        torch.manual_seed(length)
        inputs = model.inputs(length)
        with torch.no_grad():
            expected = reference(**placed(inputs, dtype, "cpu"))[0].float()
            found = compiled(**placed(inputs, dtype, "npu"))[0].cpu().float()
        difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert difference <= TOLERANCES[dtype], (length, difference)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    (report,) = sgl_npu.reports()[before:]
    assert [site.op for site in report.sites] == ["npu.npu_fused_infer_attention_score"] * model.sites
    return report
