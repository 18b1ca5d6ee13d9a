"""Which CUDA kernel is chosen for which attention, judged on fake tensors, so that no GPU is needed.

What the rows emit is computed on the CPU here, and by the kernels of a GPU in tests/cuda.
"""

import pytest
import torch
from random_attention import Call, check_call, random_call
from torch._subclasses.fake_tensor import FakeTensorMode

import sgl_npu
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.platforms import PLATFORMS, Platform

BF16, BOOL = torch.bfloat16, torch.bool


def chosen(inner="inductor", rows=40, keys=40, **settings):
    """The row that takes a call, the call, and what the rows before it said. Pairs (shape, dtype) become tensors."""
    given = {
        name: torch.empty(value[0], dtype=value[1], device="cuda") if isinstance(value, tuple) else value
        for name, value in settings.items()
    }
    query, key = (
        torch.empty(2, n, h, 64, dtype=BF16, device="cuda").transpose(1, 2) for n, h in ((rows, 4), (keys, 2))
    )
    call = AttentionCall(query, key, torch.empty_like(key), inner=inner, **given)
    refusals = {}
    for kernel in PLATFORMS["cuda"].forward:
        if kernel.applies(call):
            clause = kernel.refuse(call)
            if clause is None:
                return kernel, call, refusals
            refusals[kernel.name] = clause
    raise AssertionError(refusals)


CASES = {
    "no mask": ({}, "sdpa"),
    "top-left causal": ({"upper": 0}, "sdpa"),
    "padding": ({"mask": ((2, 1, 1, 40), BOOL)}, "sdpa"),
    "a bias": ({"bias": ((40, 40), BF16)}, "sdpa"),
    "a side that excludes nothing": ({"lower": -39, "upper": 39}, "sdpa"),
    "bottom-right causal": ({"keys": 50, "upper": 10}, "sdpa_masked"),
    "padding and causal": ({"upper": 0, "mask": ((2, 1, 1, 40), BOOL)}, "sdpa_masked"),
    "window": ({"lower": -5, "upper": 0}, "flex"),
    "window without Inductor": ({"lower": -5, "upper": 0, "inner": "eager"}, "sdpa_masked"),
    "window and padding": ({"lower": -5, "upper": 0, "mask": ((2, 1, 1, 40), BOOL)}, "sdpa_masked"),
    "softcap": ({"softcap": 5.0}, "flex"),
    "softcap without Inductor": ({"softcap": 5.0, "inner": "eager"}, "reference"),
    "sinks": ({"sinks": ((4,), BF16)}, "reference"),
    "a used lse": ({"needs_lse": True}, "reference"),
    "a bias in another dtype": ({"bias": ((40, 40), torch.float32)}, "reference"),
    "no key": ({"keys": 0}, "reference"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_call_goes_to_the_first_row_that_takes_it(case):
    settings, name = CASES[case]
    with FakeTensorMode():
        kernel, _, refusals = chosen(**settings)
    assert kernel.name == name
    assert all(refusals.values())


# ---------------------------------------------------------------- values, of the same rows on CPU tensors


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setitem(PLATFORMS, "cpu", Platform("cpu", PLATFORMS["cuda"].forward))


@pytest.mark.parametrize("part", range(2))
def test_random_calls_are_what_the_formula_says(on_cpu, part):
    for number in range(12):
        check_call(random_call(1000 * part + number), "cpu", number % 3 == 0, dynamic=number % 4 == 1)


BANDS = [(40, 40, {"upper": 0}), (40, 53, {"upper": 13}), (40, 40, {"lower": -5, "upper": 0}), (40, 40, {"upper": -1})]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rows, keys, band", BANDS)
def test_no_side_of_a_band_is_lost(on_cpu, rows, keys, band, dynamic):
    tensors = [torch.randn(2, heads, count, 16) for count, heads in ((rows, 4), (keys, 2), (keys, 2))]
    check_call(Call([*tensors, None, None, None], {"scale": 0.25, **band}), "cpu", False, dynamic)
    (site,) = sgl_npu.reports()[-1].sites
    assert site.kernel == ("sdpa" if band == {"upper": 0} and not dynamic else "sdpa_masked")
