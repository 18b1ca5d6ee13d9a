"""aten ops that torchair has no GE converter for, in ops that it has.

torchair 2.13.0 registers converters for them that raise NotImplementedError. The tables name those that models use in
inference and that can be computed exactly: by torch's own decomposition where that ends in ops with a converter, else
by a formula of ours. What is not named reaches torchair as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions

from sgl_npu.compiler import ge_formulas as formulas

aten = torch.ops.aten

MISSING = (
    aten.addr, aten.aminmax, aten.celu, aten.clamp_max.Tensor, aten.clamp_min.Tensor, aten.count_nonzero,
    aten.deg2rad, aten.diag_embed, aten.eye, aten.frac, aten.isneginf, aten.isposinf, aten.lerp.Tensor, aten.logaddexp,
    aten.logaddexp2, aten.mv, aten.nansum, aten.norm, aten.pixel_shuffle, aten.relu6, aten.softplus, aten.unsafe_split,
    aten.xlogy.Tensor,
)  # fmt: skip

FORMULAS: dict[Any, Callable] = {
    aten.all.dim: formulas.all_of,
    aten.amax.default: formulas.amax,
    aten.amin.default: formulas.amin,
    aten.constant_pad_nd.default: formulas.pad,
    aten.exp2.default: formulas.exp2,
    aten.histc.default: formulas.integer_histogram,
    aten.index_copy.default: formulas.index_copy,
    aten.index_fill.int_Scalar: formulas.index_fill,
    aten.index_fill.int_Tensor: formulas.index_fill_tensor,
    aten.isfinite.default: formulas.isfinite,
    aten.isnan.default: formulas.isnan,
    aten.roll.default: formulas.roll,
    aten.std.correction: formulas.std,
    aten.std_mean.correction: formulas.std_mean,
    aten.trace.default: formulas.trace,
    aten.trunc.default: formulas.trunc,
    aten.var.correction: formulas.var,
    aten.var_mean.correction: formulas.var_mean,
}


def ge_decompositions() -> dict[Any, Callable]:
    """The table for AOTAutograd, before the one that torchair brings itself."""
    return {**get_decompositions(MISSING), **FORMULAS}
