"""From a softmax back to the product of query and key: one normal form for any order of the ops between.

    softmax input  =  cap(scale * query · key * factors) + terms, and a column of sinks beside it

The walk goes from the softmax inwards. What multiplies the scores multiplies `scale`; a term that is met further in was
multiplied with them, so it takes the scale of the place where it stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sgl_npu.passes.axes import view_source
from sgl_npu.passes.constants import CASTS, MASKED, number
from sgl_npu.passes.fx_ops import aten, same_shape
from sgl_npu.passes.match_idle import Users, score_views, used_elsewhere, without_shift
from sgl_npu.passes.match_terms import Term, additive_terms, filled, mask_term
from sgl_npu.passes.site import Refusal
from sgl_npu.runtime.sizes import Size, known

PRODUCTS = (aten.bmm.default, aten.mm.default, aten.matmul.default)
_CLAMPS = (aten.maximum.default, aten.clamp.default, aten.clamp_min.default)


@dataclass(frozen=True)
class Factor:
    """A tensor or a number known at run time that multiplies, or divides, the scores and is the same for every key."""

    node: fx.Node
    level: tuple[Size, ...]
    divides: bool


@dataclass(frozen=True)
class Scores:
    """The normal form. `levels` are the shapes that the scores have on the way, outermost first."""

    levels: tuple[tuple[Size, ...], ...]
    scale: float = 1.0
    softcap: float = 0.0
    factors: tuple[Factor, ...] = ()
    terms: tuple[Term, ...] = ()
    sinks: fx.Node | None = None
    sinks_first: bool = False
    product: tuple[fx.Node, fx.Node] | None = None

    def plus(self, *terms: Term) -> Scores:
        return replace(self, terms=(*self.terms, *terms))

    def times(self, factor: float) -> Scores:
        return replace(self, scale=self.scale * factor)


def read_scores(softmax: fx.Node) -> Scores | Refusal:
    """The scores that go into a softmax over the last dimension."""
    node, users = _bare(softmax.args[0], (softmax,))
    if isinstance(node, Refusal):
        return node
    if node.target is not aten.cat.default:
        return _walk(node, users, Scores((tuple(node.meta["val"].shape),)))
    if (refusal := used_elsewhere(node, users)) is not None:
        return refusal
    parts, dim, rank = node.args[0], (node.args[1] if len(node.args) > 1 else 0), node.meta["val"].dim()
    found: Scores | Refusal | None = None
    for scores, column in (parts, parts[::-1]) if len(parts) == 2 and dim % rank == rank - 1 else ():
        if known(column.meta["val"].size(-1) == 1) and not isinstance(found, Scores):
            start = Scores((tuple(scores.meta["val"].shape),), sinks=column, sinks_first=column is parts[0])
            found = _walk(scores, (node,), start)
    return found or Refusal("the scores are concatenated of parts that are not scores and one column of sinks", node)


def _bare(node: fx.Node, users: Users) -> tuple[fx.Node | Refusal, Users]:
    """What is behind casts and a subtracted maximum, and the users it may have."""
    while True:
        if node.target in CASTS:
            if (refusal := used_elsewhere(node, users)) is not None:
                return refusal, users
            node, users = node.args[0], (node,)
            continue
        inner, allowed = without_shift(node, users)
        if inner is node:
            return node, users
        node, users = inner, allowed


def _walk(node: fx.Node, users: Users, scores: Scores) -> Scores | Refusal:
    """Take the ops off one by one down to the product."""
    while True:
        if (refusal := used_elsewhere(node, users)) is not None:
            return refusal
        if node.target is aten.sub.Tensor and scores.softcap == 0.0 and scores.sinks is None:
            inner, allowed = without_shift(node, users)
            if inner is not node:
                node, users = inner, allowed
                continue
        if node.target in PRODUCTS:
            return replace(scores, product=(node.args[0], node.args[1]))
        if node.target is aten.baddbmm.default:
            return _batched_sum(node, scores)
        if node.target is aten.add.Tensor:
            return _sum(node, scores)
        if view_source(node) is not None:
            chain = score_views(node)
            if isinstance(chain, Refusal):
                return chain
            node, users = chain[-1], (chain[-2],)
            scores = replace(scores, levels=(*scores.levels, tuple(node.meta["val"].shape)))
            continue
        step = _step(node, scores)
        if isinstance(step, Refusal):
            return step
        users = (node,)
        node, scores = step


def _step(node: fx.Node, scores: Scores) -> tuple[fx.Node, Scores] | Refusal:
    """One op off: the scores inside it and what it does to them."""
    if node.target in CASTS and node.meta["val"].is_floating_point():
        return node.args[0], scores
    if node.target is aten.tanh.default:
        return _capped(node, scores)
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return _scaled(node, scores)
    if scores.softcap == 0.0:
        found = filled(node)
        if found is not None and isinstance(found[2], fx.Node) and same_shape(node, found[2]):
            if scores.scale <= 0 or scores.factors:
                return Refusal("the mask is filled in before a scale that may be negative", node)
            return found[2], scores.plus(mask_term(found[0], scores.levels[-1], found[1]))
        if node.target in _CLAMPS and _clamps_nothing(node):
            return node.args[0], scores
        if node.target is aten.sub.Tensor and _is_scores(node, node.args[0]) and isinstance(node.args[1], fx.Node):
            if node.kwargs.get("alpha", 1) != 1 or not isinstance(node.args[1].meta["val"], torch.Tensor):
                return Refusal("a difference with a factor of its own, or with a number known at run time only", node)
            inside = len(scores.factors)
            term = Term(node.args[1], scores.levels[-1], False, factor=-scores.scale, inside=inside)
            return node.args[0], scores.plus(term)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return Refusal(f"masked scores are filled with {node.args[2]}, not with a number that forbids a key", node)
    return Refusal(f"the scores come from {_name(node)}, which is no step of a softmax attention", node)


def _is_scores(node: fx.Node, operand: Any) -> bool:
    return isinstance(operand, fx.Node) and same_shape(node, operand)


def _clamps_nothing(node: fx.Node) -> bool:
    """Clamping from below at a number that is as good as forbidden."""
    low = number(node.args[1]) if len(node.args) > 1 else None
    return low is not None and low <= MASKED and len(node.args) < 3 and _is_scores(node, node.args[0])


def _sum(node: fx.Node, scores: Scores) -> Scores | Refusal:
    """scores + term; where both could be scores, the first that leads to a product is."""
    if node.kwargs.get("alpha", 1) != 1:
        return Refusal("a sum with a factor of its own", node)
    if scores.softcap != 0.0:
        return Refusal("a term is added inside the softcap", node)
    first: Refusal | None = None
    operands = node.args[:2]
    for inner, term in (operands, operands[::-1]):
        if not _is_scores(node, inner):
            continue
        if isinstance(term, fx.Node) and isinstance(term.meta["val"], torch.Tensor):
            terms = additive_terms(term, scores.levels[-1], scores.scale, len(scores.factors))
        elif number(term) == 0.0 or (number(term) is not None and scores.sinks is None):
            terms = []  # the same for every key: softmax does not see it
        else:
            continue
        found = _walk(inner, (node,), scores.plus(*terms))
        if isinstance(found, Scores):
            return found
        first = first or found
    return first or Refusal("a sum of which no part has the shape of the scores", node)


def _batched_sum(node: fx.Node, scores: Scores) -> Scores | Refusal:
    """beta * term + alpha * left · right."""
    term, left, right = node.args[:3]
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    if not all(isinstance(x, (int, float)) for x in (beta, alpha)):
        return Refusal("baddbmm with a factor that is known at run time only", node)
    if beta != 0 and scores.softcap != 0.0:
        return Refusal("a term is added inside the softcap", node)
    inside = len(scores.factors)
    terms = additive_terms(term, scores.levels[-1], scores.scale * beta, inside) if beta != 0 else []
    return replace(scores.plus(*terms).times(float(alpha)), product=(left, right))


def _scaled(node: fx.Node, scores: Scores) -> tuple[fx.Node, Scores] | Refusal:
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    operands = node.args[:2]
    if "rounding_mode" in node.kwargs:
        return Refusal("the scores are divided and rounded", node)
    for inner, other in (operands,) if divides else (operands, operands[::-1]):
        if not _is_scores(node, inner):
            continue
        value = number(other)
        if value is not None:
            if value == 0.0 or not math.isfinite(value):
                return Refusal(f"the scores are multiplied or divided by {value}", node)
            return inner, scores.times(1.0 / value if divides else value)
        if isinstance(other, fx.Node) and _is_same_for_every_key(other):
            return inner, replace(scores, factors=(*scores.factors, Factor(other, scores.levels[-1], divides)))
    return Refusal("the scores are multiplied or divided by a tensor that differs from key to key", node)


def _is_same_for_every_key(node: fx.Node) -> bool:
    value = node.meta["val"]
    return not isinstance(value, torch.Tensor) or value.dim() == 0 or known(value.size(-1) == 1)


def _capped(node: fx.Node, scores: Scores) -> tuple[fx.Node, Scores] | Refusal:
    """cap * tanh(x): what multiplied the scores so far is the cap, and x is scores / cap."""
    if scores.softcap != 0.0 or scores.factors:
        return Refusal("a tanh whose cap is known at run time only, or two of them", node)
    if scores.scale <= 0.0:
        return Refusal(f"a tanh times {scores.scale}: no softcap", node)
    return node.args[0], replace(scores, softcap=scores.scale, scale=scores.scale)


def _name(node: fx.Node) -> str:
    return f"{node.target._opname!r}" if hasattr(node.target, "_opname") else f"the {node.op} {node.name!r}"
