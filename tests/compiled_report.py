"""Compile a function with the backend, hold its result against eager, and hand back what the backend reports."""

from __future__ import annotations

import torch

import sgl_npu

ATTENTION = torch.ops.sgl_npu.attention.default
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5, torch.float64: 1e-10}


def compiled(function, *args, platform="npu", inner="eager", dynamic=None):
    """The reports of one call of `function` compiled, whose values, dtypes and strides must be those of eager."""
    before = len(sgl_npu.reports())
    with torch.no_grad():
        expected = function(*args)
        got = compile_for(function, platform, inner, dynamic)(*args)
    assert_same(got, expected)
    reports = sgl_npu.reports()[before:]
    assert reports, "nothing was compiled"
    return reports


def compile_for(function, platform="npu", inner="eager", dynamic=None):
    torch._dynamo.reset()
    options = {"platform": platform, "inner": inner, "strict": True}
    return torch.compile(function, backend="sgl_npu", options=options, dynamic=dynamic)


def assert_same(got, expected):
    for x, y in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True):
        tolerance = TOLERANCES[y.dtype]
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)
        assert_same_strides(x, y)


def assert_same_strides(x, y):
    """Strides along dimensions of size 1, and of empty tensors, say nothing."""
    for size, one, other in zip(x.shape, x.stride(), y.stride(), strict=True):
        assert x.numel() == 0 or size == 1 or one == other, (x.shape, x.stride(), y.stride())


def only_site(reports):
    sites = [site for report in reports for site in report.sites]
    assert len(sites) == 1, sites
    return sites[0]


def count(report, op):
    """How often an op, "aten.clone" say, is called in the graph."""
    return sum(f" = {op}(" in line or f" = {op}." in line for line in report.graph.splitlines())
