"""How each op rewrites the index at which its inputs are read, and what it computes from them: one row per op."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from sgl_npu.passes import index_arithmetic as arithmetic
from sgl_npu.passes import index_pieces as pieces
from sgl_npu.passes import index_views as views
from sgl_npu.passes.index_space import Index, IndexSpace, Rule, argument, size_expression
from sgl_npu.passes.index_values import Fit, at_most, below, equal, recomposed

aten, prims = torch.ops.aten, torch.ops.prims


def _arange(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    first, step = (node.args[0] if len(node.args) > 1 else 0), argument(node, 2, "step", 1)
    return size_expression(first) + size_expression(step) * index[0]


def _iota(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
    return size_expression(node.kwargs["start"]) + size_expression(node.kwargs["step"]) * index[0]


def _constant(position: int | None, value: int = 0) -> Rule:
    """A tensor filled with an argument, or with a number that the op's name says."""

    def rule(space: IndexSpace, node: fx.Node, index: Index) -> sympy.Basic:
        return size_expression(value if position is None else argument(node, position, "fill_value"))

    return rule


_subtract = arithmetic.elementwise(lambda a, b: recomposed(a - b))
_add = arithmetic.elementwise(lambda a, b: recomposed(a + b))


def _quotient(values: Fit, dividend: sympy.Basic, divisor: sympy.Integer) -> sympy.Basic:
    return values.divided(dividend, divisor)[0]


def _remainder(values: Fit, dividend: sympy.Basic, divisor: sympy.Integer) -> sympy.Basic:
    return values.divided(dividend, divisor)[1]


_COMPARISONS: dict[str, Callable[..., sympy.Basic]] = {
    "eq": equal,
    "ne": lambda a, b: sympy.Not(equal(a, b)),
    "lt": below,
    "le": at_most,
    "gt": lambda a, b: below(b, a),
    "ge": lambda a, b: at_most(b, a),
}

RULES: dict[Any, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    prims.iota.default: _iota,
    aten.full.default: _constant(1),
    aten.full_like.default: _constant(1),
    aten.new_full.default: _constant(2),
    aten.scalar_tensor.default: _constant(0),
    aten.fill.Scalar: _constant(1),
    aten.zeros.default: _constant(None, 0),
    aten.zeros_like.default: _constant(None, 0),
    aten.new_zeros.default: _constant(None, 0),
    aten.ones.default: _constant(None, 1),
    aten.ones_like.default: _constant(None, 1),
    aten.new_ones.default: _constant(None, 1),
    aten._to_copy.default: views.same,
    prims.convert_element_type.default: views.same,
    aten.clone.default: views.same,
    aten.alias.default: views.same,
    aten.detach.default: views.same,
    aten.lift_fresh_copy.default: views.same,
    aten.expand.default: views.same,
    aten.copy.default: lambda space, node, index: space.operand(node.args[1], node.meta["val"].shape, index),
    aten.permute.default: views.permute(lambda node, rank: [d % rank for d in node.args[1]]),
    aten.transpose.int: views.permute(views.transposed),
    aten.t.default: views.permute(views.transposed),
    aten.unsqueeze.default: views.unsqueeze,
    aten.select.int: views.select,
    aten.slice.Tensor: views.slice_,
    aten.view.default: views.view,
    aten._unsafe_view.default: views.view,
    aten.reshape.default: views.view,
    aten.squeeze.default: views.view,
    aten.squeeze.dim: views.view,
    aten.squeeze.dims: views.view,
    aten.repeat.default: views.repeat,
    aten.flip.default: views.flip,
    prims.rev.default: views.flip,
    operator.getitem: views.split_part,
    aten.roll.default: pieces.roll,
    aten.constant_pad_nd.default: pieces.pad,
    aten.cat.default: pieces.cat,
    aten.stack.default: pieces.stack,
    aten.select_scatter.default: pieces.select_scatter,
    aten.slice_scatter.default: pieces.slice_scatter,
    aten.gather.default: pieces.gather,
    aten.index.Tensor: pieces.index_,
    aten._unsafe_index.Tensor: pieces.index_,
    aten.index_select.default: pieces.index_select,
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _subtract,
    aten.sub.Scalar: _subtract,
    aten.rsub.Scalar: arithmetic.elementwise(lambda a, b: b - a),
    aten.mul.Tensor: arithmetic.elementwise(lambda a, b: a * b),
    aten.mul.Scalar: arithmetic.elementwise(lambda a, b: a * b),
    aten.neg.default: arithmetic.elementwise(lambda a: -a, 1),
    aten.abs.default: arithmetic.elementwise(lambda a: sympy.Max(a, -a), 1),
    aten.floor_divide.default: arithmetic.division(_quotient),
    aten.div.Tensor_mode: arithmetic.division(_quotient),
    aten.div.Scalar_mode: arithmetic.division(_quotient),
    aten.remainder.Scalar: arithmetic.division(_remainder),
    aten.remainder.Tensor: arithmetic.division(_remainder),
    aten.fmod.Scalar: arithmetic.division(_remainder, negative=False),
    aten.fmod.Tensor: arithmetic.division(_remainder, negative=False),
    aten.minimum.default: arithmetic.elementwise(sympy.Min),
    aten.maximum.default: arithmetic.elementwise(sympy.Max),
    aten.clamp.default: arithmetic.clamp,
    aten.clamp.Tensor: arithmetic.clamp,
    aten.clamp_min.default: arithmetic.clamp_by(sympy.Max),
    aten.clamp_max.default: arithmetic.clamp_by(sympy.Min),
    aten.cumsum.default: arithmetic.cumsum,
    aten.where.self: arithmetic.where,
    aten.masked_fill.Scalar: arithmetic.masked_fill,
    aten.masked_fill.Tensor: arithmetic.masked_fill,
    aten.tril.default: arithmetic.triangle(at_most),
    aten.triu.default: arithmetic.triangle(lambda distance, diagonal: at_most(diagonal, distance)),
    **{
        getattr(getattr(aten, name), overload): arithmetic.elementwise(compare)
        for name, compare in _COMPARISONS.items()
        for overload in ("Tensor", "Scalar")
    },
    aten.bitwise_and.Tensor: arithmetic.logic(sympy.And),
    aten.bitwise_or.Tensor: arithmetic.logic(sympy.Or),
    aten.bitwise_xor.Tensor: arithmetic.logic(sympy.Xor),
    aten.bitwise_not.default: arithmetic.logic(sympy.Not, 1),
    aten.logical_and.default: arithmetic.logic(sympy.And),
    aten.logical_or.default: arithmetic.logic(sympy.Or),
    aten.logical_xor.default: arithmetic.logic(sympy.Xor),
    aten.logical_not.default: arithmetic.logic(sympy.Not, 1),
}
