"""A softmax over the last dimension, in the spellings that it has: the anchor of every match.

_softmax(x)   _safe_softmax(x)                                one node
exp(x) / sum(exp(x))   exp(x) * (1 / sum(exp(x)))             x with or without its maximum subtracted
(exp(x) · v) / sum(exp(x))                                    divided after the product with the value
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sgl_npu.passes.axes import view_source
from sgl_npu.passes.constants import is_float_cast, number
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.site import Refusal
from sgl_npu.runtime.sizes import known

_WHOLE = (aten._softmax.default, aten._safe_softmax.default)
_EXPONENTIALS = (aten.exp.default,)
_SUMS = (aten.sum.dim_IntList,)


@dataclass(frozen=True)
class Softmax:
    """`node` holds the probabilities of `scores`; or, where `total` is given, what `total` must still divide.

    `start` are the nodes that read the scores.
    """

    node: fx.Node
    scores: fx.Node
    start: tuple[fx.Node, ...]
    total: fx.Node | None = None


def find_softmaxes(graph: fx.Graph) -> list[Softmax | Refusal]:
    """Every softmax of a graph in graph order, and those over another dimension than the last as refusals."""
    found = []
    for node in graph.nodes:
        if node.target in _WHOLE:
            found.append(_whole(node))
        elif node.target in _EXPONENTIALS and (spelled := _spelled_out(node)) is not None:
            found.append(spelled)
    return found


def _whole(node: fx.Node) -> Softmax | Refusal:
    dim, rank = node.args[1], node.meta["val"].dim()
    if rank < 2 or dim % rank != rank - 1:
        return Refusal(f"a softmax over dimension {dim} of {rank}: attention's is over the last, the keys", node)
    return Softmax(node, node.args[0], (node,))


def _spelled_out(exponential: fx.Node) -> Softmax | None:
    """exp(x) that is divided by its own sum over the last dimension, now or after the product."""
    weights = exponential
    while len(weights.users) == 1 and is_float_cast(cast := next(iter(weights.users))):
        weights = cast
    sums = [user for user in weights.users if _is_row_sum(user, weights)]
    others = [user for user in weights.users if user not in sums]
    if len(sums) != 1 or len(others) != 1:
        return None
    scores, start = exponential.args[0], (exponential,)
    if divides_by(others[0], weights, sums[0]):
        return Softmax(others[0], scores, start)
    return Softmax(weights, scores, start, total=sums[0])


def _is_row_sum(node: fx.Node, weights: fx.Node) -> bool:
    rank = weights.meta["val"].dim()
    dims = node.args[1] if node.target in _SUMS and node.meta["val"].is_floating_point() else None
    return rank >= 2 and dims is not None and [dim % rank for dim in dims] == [rank - 1]


def divides_by(node: fx.Node, x: fx.Node, total: fx.Node) -> bool:
    """Whether `node` is x / total, row by row, or x * (1 / total); `total` may go through casts and views."""
    if node.target is aten.div.Tensor and node.args[0] is x and "rounding_mode" not in node.kwargs:
        return _is_total(node.args[1], total, node)
    if node.target is aten.mul.Tensor:
        other = node.args[1] if node.args[0] is x else node.args[0]
        if isinstance(other, fx.Node) and other.target is aten.mul.Tensor and number(other.args[1]) == 1.0:
            other = other.args[0]  # 1 / x is reciprocal(x) * 1
        if isinstance(other, fx.Node) and other.target is aten.reciprocal.default:
            return _is_total(other.args[0], total, node)
    return False


def _is_total(node: object, total: fx.Node, quotient: fx.Node) -> bool:
    """`node` is `total`, in the shape in which each row of the quotient reads its own sum."""
    if not isinstance(node, fx.Node):
        return False
    shape, wanted = node.meta["val"].shape, quotient.meta["val"].shape
    rows = len(shape) == len(wanted) and known(shape[-1] == 1)
    if not rows or not all(known(a == b) for a, b in zip(shape[:-1], wanted[:-1], strict=True)):
        return False
    found: fx.Node = node
    while found is not total:
        source = found.args[0] if is_float_cast(found) else view_source(found)
        if source is None or len(found.users) != 1 or not _keeps_rows(found, source):
            return False
        found = source
    return len(total.users) == 1


def _keeps_rows(view: fx.Node, source: fx.Node) -> bool:
    """Copies, and views that only put a last dimension of size 1."""
    if view.target in (aten.permute.default, aten.transpose.int, aten.t.default):
        return False
    before, after = source.meta["val"].shape, view.meta["val"].shape
    rows = after[:-1] if len(after) == len(before) + 1 else after
    return len(rows) == len(before) and all(known(a == b) for a, b in zip(before, rows, strict=True))
