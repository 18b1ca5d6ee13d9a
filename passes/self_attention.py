"""Whether the queries and keys of an attention are projections of the same tokens: equal lengths prove nothing.

Rows are followed back op by op, as in `token_rows`, to what they are projected from. Query and key must come from the
same rows of the same tensors, in the same order: what was shifted, cut, gathered or taken from another sample is
refused.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, fx

from sgl_npu.passes.fx_ops import VIEWS, aten
from sgl_npu.passes.token_rows import PRODUCTS, Step, sources, whole_rows
from sgl_npu.runtime.sizes import known, same_sizes

_PROJECTIONS = (*PRODUCTS, aten.convolution.default)
_LOOKED_THROUGH = (*VIEWS, aten.clone.default, aten._to_copy.default, aten.permute.default, aten.transpose.int)
# These take a shape and no value.
_LIKE = (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
_LIMIT = 400  # steps between an attention and its projections: norms and rotary embeddings take some dozens


def is_self_attention(query: fx.Node, key: fx.Node) -> bool:
    """Both come from projections of the same rows of the same activations, of the same samples."""
    return all(_same(_projected(query, dim), _projected(key, dim)) for dim in _row_dims(query))


def _row_dims(query: fx.Node) -> list[int]:
    """Tokens and, where there are several, samples."""
    return [2] if known(query.meta["val"].size(0) == 1) else [2, 0]


def _same(one: list[Step] | None, other: list[Step] | None) -> bool:
    """Whether the rows come from the same; nothing and what is unknown is never the same."""
    if not one or not other or len(one) != len(other):
        return False
    return all(any(_equal(step, x) for x in other) for step in one)


def _equal(one: Step, other: Step) -> bool:
    return one.key == other.key and same_sizes((one.before, one.after), (other.before, other.after))


def _one_back(step: Step) -> list[Step]:
    """What the rows of a step are computed from, with all that is around them or cut away since."""
    steps = sources(step.node, step.rows)
    return [replace(x, before=step.before + x.before, after=step.after + x.after) for x in steps]


def _projected(node: fx.Node, dim: int) -> list[Step] | None:
    """The rows that are projected to those of a dimension; None where an op on the way may move them."""
    found: list[Step] = []
    visited: list[Step] = []
    pending = [Step(node, whole_rows(node, dim))]
    while pending:
        step = pending.pop()
        if any(_equal(step, x) for x in visited):
            continue
        visited.append(step)
        if len(visited) > _LIMIT:
            return None
        inner = _one_back(step)
        if step.node.target in _PROJECTIONS:
            if dim == 2 and not _has_all_rows(step, node):
                return None
            origins = [_origin(x) for x in inner] or [_of_convolution(step)]
            found += [x for x in origins if not any(_equal(x, other) for other in found)]
        elif not inner and _is_computed_from_a_projection(step.node):
            return None
        else:
            pending += inner
    return found


def _has_all_rows(projection: Step, query: fx.Node) -> bool:
    """Whether what is projected has no more rows than are attended: samples or frames may have been picked since."""
    batch, heads, length = query.meta["val"].shape[:3]
    shape = projection.node.meta["val"].shape
    columns = shape[1] if projection.node.target is aten.convolution.default else shape[-1]
    rows, attended = math.prod(shape) // columns, batch * (length - projection.before - projection.after)
    folded = known(heads == 1) and not known(attended % rows != 0)  # heads may be among the samples
    return folded or not known(rows != attended)


def _origin(step: Step) -> Step:
    """The tensor that a projection reads, without the views that are its own."""
    while step.node.target in _LOOKED_THROUGH:
        inner = _one_back(step)
        if len(inner) != 1:
            break
        (step,) = inner
    return step


def _of_convolution(step: Step) -> Step:
    """Rows that are pixels of what is convolved, or columns of a product, which is an origin of its own."""
    if step.node.target is aten.convolution.default:
        return replace(step, node=step.node.args[0])
    return step


def _is_computed_from_a_projection(node: fx.Node) -> bool:
    if node.target in _LIKE:
        return False
    pending, seen = [node], {node}
    while pending:
        for x in pending.pop().all_input_nodes:
            if x.target in _PROJECTIONS:
                return True
            if x not in seen and isinstance(x.meta.get("val"), (Tensor, tuple, list)):
                seen.add(x)
                pending.append(x)
        if len(seen) > _LIMIT:
            return True
    return False
