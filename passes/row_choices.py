"""Between which tensors an op chooses row by row, so that one sequence has tokens of several.

    where(mask, a, b)   lerp(a, b, mask)   a * mask + b * (1 - mask)

A mask has a value for each row. In arithmetic it is one only if it comes from booleans: other factors are scales.
"""

from __future__ import annotations

import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.token_rows import Step, sources

_BY_MASK = {aten.where.self: 0, aten.lerp.Tensor: 2}  # and where the mask is among the arguments
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_DEEPEST_MASK = 16


def row_choices(node: fx.Node, steps: list[Step]) -> list[Step]:
    """The tensors that are chosen between; fewer than two where nothing is. `steps`: the sources of the node's rows."""
    if node.target in _BY_MASK:
        mask = node.args[_BY_MASK[node.target]]
        return [x for x in steps if x.node is not mask] if any(x.node is mask for x in steps) else []
    if node.target in _SUMS and len(steps) > 1 and any(_is_switched(x) for x in steps):
        return steps
    return []


def _is_switched(step: Step) -> bool:
    """A product with a mask."""
    factors = sources(step.node, step.rows) if step.node.target is aten.mul.Tensor else []
    return len(factors) > 1 and any(_is_mask(x) for x in factors)


def _is_mask(step: Step, depth: int = _DEEPEST_MASK) -> bool:
    """Whether all of its rows come from booleans."""
    if step.node.meta["val"].dtype == torch.bool:
        return True
    inner = sources(step.node, step.rows) if depth else []
    return bool(inner) and all(_is_mask(x, depth - 1) for x in inner)
