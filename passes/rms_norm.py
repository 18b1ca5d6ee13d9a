"""An RMS norm over the last dimension, however it is written.

x * rsqrt(mean(x²) + eps), x * (mean(x²) + eps) ** -0.5, x / sqrt(mean(x²) + eps), aten._fused_rms_norm
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from sgl_npu.passes.fx_ops import DIVISIONS, MULTIPLICATIONS, aten, same_value, widens

_CASTS = (aten._to_copy.default, aten.clone.default)


@dataclass(frozen=True)
class RmsNorm:
    """x, the number that is added to its mean square, and the weight where the op has one."""

    source: fx.Node
    eps: float
    weight: fx.Node | None = None


def rms_norm(node: fx.Node) -> RmsNorm | None:
    """The norm whose result a node is, the product with a weight not among it."""
    if node.op != "call_function":
        return None
    if node.target in (*MULTIPLICATIONS, *DIVISIONS):
        return next(_candidates(node), None)
    (many, *_) = node.args
    if isinstance(many, fx.Node) and many.target is aten._fused_rms_norm.default:
        x, shape, weight, eps = (*many.args, *(None,) * 4)[:4]
        return RmsNorm(x, eps, weight) if len(shape) == 1 and isinstance(eps, float) else None
    return None


def _candidates(node: fx.Node) -> Iterator[RmsNorm]:
    one, other = node.args[:2]
    pairs = [(one, other)] if node.target in DIVISIONS else [(one, other), (other, one)]
    for x, root in pairs:
        if not isinstance(x, fx.Node) or not isinstance(root, fx.Node):
            continue
        sum_ = _under_root(_without_casts(root), inverse=node.target in MULTIPLICATIONS)
        found = _mean_square(sum_) if sum_ is not None else None
        if found is None or not same_value(_without_casts(found[0]), _without_casts(x)):
            continue
        yield RmsNorm(x, found[1])


def _under_root(node: fx.Node, inverse: bool) -> fx.Node | None:
    if node.target is (aten.rsqrt.default if inverse else aten.sqrt.default):
        return _without_casts(node.args[0])
    is_power = node.target is aten.pow.Tensor_Scalar and node.args[1] == (-0.5 if inverse else 0.5)
    if is_power:
        return _without_casts(node.args[0])
    if inverse and node.target is aten.reciprocal.default:
        return _under_root(_without_casts(node.args[0]), inverse=False)
    return None


def _mean_square(node: fx.Node) -> tuple[fx.Node, float] | None:
    """x and eps of mean(x², -1) + eps."""
    if node.target not in (aten.add.Tensor, aten.add.Scalar) or node.kwargs or not isinstance(node.args[1], float):
        return None
    mean = _without_casts(node.args[0])
    if mean.target is not aten.mean.dim or mean.args[2:3] != (True,):
        return None
    if [dim % mean.meta["val"].dim() for dim in mean.args[1]] != [mean.meta["val"].dim() - 1]:
        return None
    x = _squared(_without_casts(mean.args[0]))
    return None if x is None else (x, node.args[1])


def _squared(node: fx.Node) -> fx.Node | None:
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.args[0]
    if node.target is aten.mul.Tensor and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _without_casts(node: Any) -> Any:
    """A tensor before it was copied or widened, which changes no value."""
    while isinstance(node, fx.Node) and node.target in _CASTS and _is_widened(node):
        node = node.args[0]
    return node


def _is_widened(node: fx.Node) -> bool:
    return widens(node.args[0].meta["val"].dtype, node.meta["val"].dtype)
