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


def check(name, spelling, dtype, inner, inner_options, lengths, every_size=True):
    """One graph for all lengths, for one a graph of numbers; as on the CPU, every attention a FIA call: the report.

    `every_size`: symbols are all sizes, not just those that follow the length, which is traced in half the time.
    """
    model = MODELS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reference, module = model.build(spelling).to(dtype), model.build(spelling).to(dtype).to("npu")
    options = {"inner": inner, "inner_options": inner_options, "strict": True}
    by_length = not every_size and _only_sizes_differ(model, lengths)
    dynamic, before = None if by_length else len(lengths) > 1, len(sgl_npu.reports())
    compiled = torch.compile(module, backend="sgl_npu", dynamic=dynamic, options=options)
    for length in lengths:
        torch.manual_seed(length)
        inputs = model.inputs(length)
        given = placed(inputs, dtype, "npu")
        if by_length:
            _mark_what_differs(given, model.inputs(sum(lengths)))
        with torch.no_grad():
            expected = reference(**placed(inputs, dtype, "cpu"))[0].float()
            found = compiled(**given)[0].cpu().float()
        difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert difference <= TOLERANCES[dtype], (length, difference)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    (report,) = sgl_npu.reports()[before:]
    assert [site.op for site in report.sites] == ["npu.npu_fused_infer_attention_score"] * model.sites
    return report


def _only_sizes_differ(model, lengths):
    """Whether inputs of several lengths are alike but for the sizes of tensors."""
    numbers = [[x for x in pytree.tree_leaves(model.inputs(n)) if not isinstance(x, torch.Tensor)] for n in lengths]
    return all(found == numbers[0] for found in numbers)


def _mark_what_differs(inputs, others):
    for x, other in zip(pytree.tree_leaves(inputs), pytree.tree_leaves(others), strict=True):
        if isinstance(x, torch.Tensor):
            for dim, (size, another) in enumerate(zip(x.shape, other.shape, strict=True)):
                if size != another:
                    torch._dynamo.mark_dynamic(x, dim)
