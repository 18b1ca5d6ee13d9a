"""Whether a dimension of a tensor runs over the features that a linear map or a convolution made.

Attention sums over features and attends over positions. Channel attention (XCiT, Restormer) has the same formula the
other way round: its keys are channels. No fused kernel is made for that, and no mask over positions means anything.
"""

from __future__ import annotations

import operator

from torch import fx

from sgl_npu.passes.axes import axes_of, through, view_chain
from sgl_npu.passes.fx_ops import aten, same_shape

_LINEAR = {aten.mm.default: 1, aten.addmm.default: 1, aten.convolution.default: 1, aten.linear.default: -1}
_SAME_DIMS = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.gelu.default)
_LONGEST = 40


def runs_over_features(node: fx.Node, dim: int) -> bool:
    """Follow the dimension up through views, slices and elementwise ops to what made it."""
    for _ in range(_LONGEST):
        chain = view_chain(node)
        axes = through(axes_of(chain[-1]), chain)
        rank = chain[0].meta["val"].dim()
        sources = {atom.place[0] for atom in axes[dim % rank]} if axes is not None else set()
        if len(sources) != 1:
            return False
        node, dim = chain[-1], sources.pop()
        if node.target in _LINEAR or _is_linear(node):
            return dim == _LINEAR.get(node.target, -1) % node.meta["val"].dim()
        found = _before(node, dim)
        if found is None:
            return False
        node, dim = found
    return False


def _is_linear(node: fx.Node) -> bool:
    """matmul with a matrix: what a linear map without bias is on an NPU."""
    return node.target is aten.matmul.default and node.args[1].meta["val"].dim() == 2


def _before(node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """The same dimension of what an op was given, None where the op makes it."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.select.int:
        removed = node.args[1] % source.meta["val"].dim()
        return source, dim + (dim >= removed)
    if node.target is operator.getitem and source.target in _SAME_DIMS:
        return source.args[0], dim
    if node.target is operator.getitem and source.target is aten.unbind.int:
        removed = (source.args[1] if len(source.args) > 1 else 0) % source.args[0].meta["val"].dim()
        return source.args[0], dim + (dim >= removed)
    if node.target in _SAME_DIMS:
        return source, dim
    if node.target in _ELEMENTWISE and same_shape(node, source):
        return source, dim
    return None
