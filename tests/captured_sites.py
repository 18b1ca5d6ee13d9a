"""The attention sites of a function that is compiled and held against eager."""

import torch

import sgl_npu

BF16 = {"atol": 2e-2, "rtol": 2e-2}
FP32 = {"atol": 1e-5, "rtol": 1e-5}


def compiled_sites(function, *args, inner="eager", tolerance=None, **compile_arguments):
    """Compile, compare values, dtypes and strides with eager, return the sites of what was compiled."""
    expected = function(*args)
    before = len(sgl_npu.reports())
    got = torch.compile(function, backend="sgl_npu", options={"inner": inner}, **compile_arguments)(*args)
    half = any(x.dtype in (torch.bfloat16, torch.float16) for x in torch.utils._pytree.tree_leaves(expected))
    torch.testing.assert_close(
        got, expected, equal_nan=True, check_stride=True, **(tolerance or (BF16 if half else FP32))
    )
    return [site for report in sgl_npu.reports()[before:] for site in report.sites]


def masks(sites):
    """The masks of the sites, all of which must be fused."""
    assert all(site.fused for site in sites), [(site.op, site.refusals) for site in sites]
    return [site.mask for site in sites]


def reasons(sites):
    assert not any(site.fused for site in sites)
    return [reason for site in sites for where, reason in site.refusals if where == "capture"]


def randn(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def keep(*shape):
    return torch.rand(shape) > 0.3
