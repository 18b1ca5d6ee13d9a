# ruff: noqa: E501
"""Samples of every operator that GE graphs get a decomposition for."""

import torch
from torch import tensor

aten = torch.ops.aten
INF, NAN = float("inf"), float("nan")

X = torch.linspace(-4, 4, 24).reshape(4, 6)
Y = torch.linspace(5, -3, 24).reshape(4, 6)
SPECIAL = tensor([-INF, INF, NAN, -0.0, 0.0, 1.0])
WHOLE = torch.arange(-12, 12).reshape(4, 6)
CUBE = torch.linspace(-3, 5, 24).reshape(2, 3, 4)
SAMPLES = {
    aten.addr.default: [(X[:, :5], X[:, 0], Y[0, :5]), (WHOLE, WHOLE[:, 0], WHOLE[0])],
    aten.aminmax.default: [(X,), (WHOLE,), (tensor(3.0),)],
    aten.celu.default: [(X,), (X, 0.5), (SPECIAL,)],
    aten.clamp_max.Tensor: [(X, Y), (X, tensor(0.5)), (WHOLE, WHOLE.flip(0)), (SPECIAL, tensor(0.5))],
    aten.clamp_min.Tensor: [(X, Y), (X, tensor(0.5)), (WHOLE, WHOLE.flip(0)), (SPECIAL, tensor(0.5))],
    aten.count_nonzero.default: [(WHOLE,), (X,), (WHOLE, -1), (SPECIAL,), (WHOLE > 0,)],
    aten.count_nonzero.dim_IntList: [(WHOLE, [0]), (CUBE, [-1, 0]), (WHOLE > 0, [1])],
    aten.deg2rad.default: [(X,), (SPECIAL,)],
    aten.diag_embed.default: [(X,), (X, 1), (X, -2), (CUBE, 0, 0, 2), (CUBE, 1, -3, -1), (WHOLE,)],
    aten.eye.default: [(3,), (0,)],
    aten.eye.m: [(3, 5), (5, 3)],
    aten.frac.default: [(X,), (-X,)],
    aten.index_copy.default: [(X, 0, tensor([2, 0]), Y[:2]), (X, -1, tensor([5]), Y[:, :1]), (WHOLE, 0, tensor([3]), WHOLE[:1])],
    aten.index_fill.int_Tensor: [(X, 1, tensor([0, 3]), tensor(7.0)), (WHOLE, -2, tensor([1]), tensor(7))],
    aten.index_fill.int_Scalar: [(X, 1, tensor([0, 3]), 7.0), (X, -2, tensor([1]), -1), (WHOLE, 0, tensor([1]), 7)],
    aten.isneginf.default: [(SPECIAL,), (WHOLE,)],
    aten.isposinf.default: [(SPECIAL,), (WHOLE,)],
    aten.lerp.Tensor: [(X, Y, X.sigmoid()), (X, Y, tensor(0.3)), (X, Y, tensor(0.7))],
    aten.logaddexp.default: [(X, Y), (X, Y[0]), (X * 100, Y), (SPECIAL, SPECIAL), (SPECIAL, tensor([-INF]))],
    aten.logaddexp2.default: [(X, Y), (X, Y[0]), (SPECIAL, SPECIAL), (SPECIAL, tensor([-INF]))],
    aten.mv.default: [(X, Y[0]), (WHOLE, WHOLE[0])],
    aten.nansum.default: [(SPECIAL,), (X, [1]), (CUBE, [0, -1], True), (X,)],
    aten.norm.Scalar: [(X,), (X, 1), (X, INF), (X, 0)],
    aten.norm.ScalarOpt_dim: [(X, 2, [1]), (CUBE, 1, [0, -1], True), (X, None, [-1]), (X, INF, [0])],
    aten.norm.ScalarOpt_dim_dtype: [(X, 2, [1], False), (X, 1, [-1], True)],
    aten.norm.ScalarOpt_dtype: [(X, 2), (X, None)],
    aten.pixel_shuffle.default: [(torch.arange(2.0 * 8 * 3 * 5).reshape(2, 8, 3, 5), 2), (torch.arange(18).reshape(9, 1, 2), 3)],
    aten.relu6.default: [(X * 3,), (WHOLE,), (SPECIAL,)],
    aten.roll.default: [(X, [1]), (X, [-2], [1]), (CUBE, [1, -3], [0, -1]), (WHOLE, [7], [0]), (X[:, :0], [1], [1])],
    aten.softplus.default: [(X,), (X * 30,), (X, 2.0, 1.0), (SPECIAL,)],
    aten.std.correction: [(X, [1]), (CUBE, [-1, 0]), (X,)],
    aten.std_mean.correction: [(X, [-1]), (X,)],
    aten.trace.default: [(X,), (WHOLE,), (X.t(),)],
    aten.unsafe_split.Tensor: [(X, 2), (X, 4, 1), (X, 4, -1), (WHOLE, 3)],
    aten.var.correction: [(X, [1]), (CUBE, [-1, 0]), (X,)],
    aten.var_mean.correction: [(X, [-1]), (X,)],
    aten.xlogy.Tensor: [(X, Y.abs()), (tensor([0.0, 0.0, 1.0, 0.0]), tensor([0.0, INF, 0.0, NAN]))],
    aten.all.dim: [(WHOLE > -9, 1), (WHOLE, -1, True), (X, 0), (tensor(True), 0)],
    aten.amax.default: [(X,), (X, [1]), (CUBE, [0, -1], True), (CUBE, [-1, 0]), (CUBE, [1, 0]), (WHOLE, [0]), (X, [], True), (SPECIAL,)],
    aten.amin.default: [(X,), (X, [1]), (CUBE, [0, -1], True), (CUBE, [-1, 0]), (CUBE, [1, 0]), (WHOLE, [0]), (X, [], True), (SPECIAL,)],
    aten.exp2.default: [(X,), (SPECIAL,)],
    aten.isfinite.default: [(SPECIAL,), (WHOLE,)],
    aten.isnan.default: [(SPECIAL,), (WHOLE,)],
    aten.trunc.default: [(X,), (SPECIAL,), (WHOLE,)],
}  # fmt: skip
# Keyword-only arguments, where a sample needs them.
SETTINGS = {
    aten.addr.default: {"beta": 2, "alpha": 3},
    aten.eye.default: {"dtype": torch.int64},
    aten.eye.m: {"dtype": torch.float16},
    aten.nansum.default: {"dtype": torch.float64},
    aten.norm.ScalarOpt_dim_dtype: {"dtype": torch.float64},
    aten.norm.ScalarOpt_dtype: {"dtype": torch.float64},
    **{getattr(aten, name).correction: {"correction": 0, "keepdim": True} for name in ("std", "std_mean", "var", "var_mean")},
}  # fmt: skip
REQUIRED = {aten.norm.ScalarOpt_dim_dtype, aten.norm.ScalarOpt_dtype}
# histc counts integers on other devices alone, and padding is decomposed by symbols alone: they have tests of their own.
OTHERS = {aten.constant_pad_nd.default, aten.histc.default}
