"""Attention by hand is the same sites and the same graph whether it was traced on the CPU or on an NPU."""

import both_devices
import handwritten
import pytest
import torch
from both_devices import compiled_on, compiled_on_both
from handwritten import BIASED, CAUSAL, GROUPED, PLAIN, inputs
from test_match_more import MASKS, nan_guard

BY_HAND = (*PLAIN, *GROUPED, *CAUSAL, *BIASED)
# Whose final graph is not the CPU's, and why.
OWN_GRAPH = {
    "softcapped": "no kernel takes it, and matmul stays whole",
    "nan_guard": "torch writes keep[-1, ..., :5] = False by fill on the CPU and by copy elsewhere",
}


def tensors(spelling, dtype=torch.bfloat16, **sizes):
    torch.manual_seed(0)
    return inputs(kv_heads=2 if spelling in GROUPED else handwritten.H, dtype=dtype, **sizes)


def same(cpu, npu, spelling):
    assert cpu.sites == npu.sites and len(npu.sites) == 1
    assert (cpu.graph == npu.graph) == (spelling.__name__ not in OWN_GRAPH)
    (site,) = npu.reports[0].sites
    assert site.fused == (spelling.__name__ != "softcapped"), site
    return site


@pytest.mark.parametrize("spelling", BY_HAND, ids=lambda f: f.__name__)
def test_a_spelling_with_symbolic_lengths_is_one_graph_on_both(spelling):
    lengths = (24, 24) if spelling in (handwritten.added_to_bias,) else (24, 17)
    calls = [tensors(spelling, rows=n, keys=n) for n in lengths]
    same(*compiled_on_both(spelling, *calls, dynamic=[] if len({*lengths}) == 1 else [2]), spelling)


@pytest.mark.parametrize("spelling", MASKS, ids=lambda f: f.__name__)
def test_a_further_spelling_has_its_mask_there_too(spelling):
    (report,) = compiled_on(both_devices.NPU, spelling, tensors(spelling)).reports
    (site,) = report.sites
    assert site.fused and site.mask == MASKS[spelling]


@pytest.mark.parametrize("spelling", [*list(MASKS)[::5], nan_guard], ids=lambda f: f.__name__)
def test_a_further_spelling_is_one_graph_on_both(spelling):
    same(*compiled_on_both(spelling, tensors(spelling)), spelling)


@pytest.mark.parametrize("spelling", (handwritten.upcast, handwritten.grouped, handwritten.with_sinks))
def test_a_spelling_in_half_precision_with_fixed_sizes(spelling):
    traced = compiled_on(both_devices.NPU, spelling, tensors(spelling, torch.float16))
    assert traced.reports[0].sites[0].kernel in ("ascend_fa", "ascend_fa_lse_sink")
