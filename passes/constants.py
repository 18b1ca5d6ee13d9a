"""Numbers that a graph writes as tensors, and how low a number must be to forbid a key."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from sgl_npu.passes.axes import view_source
from sgl_npu.passes.fx_ops import aten

# The largest number that models fill masked scores with (GPT's): exp(x - row maximum) is 0 for this and less, unless
# all scores that are kept are as low themselves.
MASKED = -1e4

CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
_FILLED = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
    aten.fill.Scalar: 1,
}


def is_float_cast(node: fx.Node) -> bool:
    """A cast from one floating dtype to another: it rounds and does nothing else."""
    return node.target in CASTS and all(
        x.meta["val"].is_floating_point() for x in (node, node.args[0]) if isinstance(x, fx.Node)
    )


def number(value: object) -> float | None:
    """The number that an argument is everywhere; None for anything that is not known while compiling."""
    if isinstance(value, bool) or not isinstance(value, (int, float, fx.Node)):
        return None
    if not isinstance(value, fx.Node):
        return float(value)
    if value.op == "get_attr":
        return _attribute(value)
    if value.target in _ZEROS:
        return 0.0
    if value.target in _ONES:
        return 1.0
    if value.target in _FILLED:
        return number(value.args[_FILLED[value.target]])
    if value.target in CASTS:
        return number(value.args[0]) if value.meta["val"].is_floating_point() else None
    source = value.args[0] if value.target is aten.expand.default else view_source(value)
    return None if source is None else number(source)


def _attribute(node: fx.Node) -> float | None:
    """The value of a tensor of one element that the traced code wrote as a literal."""
    module = node.graph.owning_module
    tensor = getattr(module, str(node.target), None)
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, (FakeTensor, torch.nn.Parameter)):
        return None
    if tensor.dim() > 0 or tensor.is_meta or not tensor.is_floating_point():
        return None
    with unset_fake_temporarily():
        return float(tensor)


def forbids(value: object) -> bool:
    """Whether a score filled with this value gets probability 0."""
    found = number(value)
    return found is not None and found <= MASKED
