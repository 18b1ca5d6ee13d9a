"""The ops through which channels can be followed back, each with its rule."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from sgl_npu.passes import channel_arithmetic as arithmetic
from sgl_npu.passes import channel_views as views
from sgl_npu.passes.channel_walk import Channels, Rule
from sgl_npu.passes.fx_ops import DIVISIONS, MULTIPLICATIONS, VIEWS, aten
from sgl_npu.passes.token_rows import PRODUCTS


def channels_of(graph: fx.Graph) -> Channels:
    """The walk through a graph."""
    return Channels(graph, _RULES)


_IDLE = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
)
_BY_OP: list[tuple[tuple[Any, ...], Rule]] = [
    (_IDLE, views.same),
    ((aten._to_copy.default,), views.cast),
    ((aten.copy.default,), views.copy),
    ((aten.expand.default,), views.expand),
    ((aten.permute.default, aten.transpose.int, aten.t.default), views.permute),
    (VIEWS, views.view),
    ((aten.unsqueeze.default,), views.unsqueeze),
    ((aten.squeeze.dim, aten.squeeze.dims), views.squeeze),
    (PRODUCTS, views.projection),
    ((aten.slice.Tensor,), views.cut),
    ((aten.select.int,), views.select),
    ((operator.getitem,), views.item),
    ((aten.cat.default,), views.concatenate),
    ((aten.stack.default,), views.stack),
    ((aten.slice_scatter.default,), views.slice_scatter),
    ((aten.select_scatter.default,), views.select_scatter),
    ((aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default), views.unwritten),
    ((aten.flip.default,), views.flip),
    ((aten.roll.default,), views.roll),
    (MULTIPLICATIONS, arithmetic.multiply),
    (DIVISIONS, arithmetic.divide),
    ((aten.add.Tensor, aten.add.Scalar), arithmetic.add(1)),
    ((aten.sub.Tensor, aten.sub.Scalar), arithmetic.add(-1)),
    ((aten.neg.default,), arithmetic.negate),
]
_RULES: dict[Any, Rule] = {op: rule for ops, rule in _BY_OP for op in ops}
