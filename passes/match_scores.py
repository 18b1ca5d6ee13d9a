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
from sgl_npu.passes.constants import CASTS, MASKED, is_float_cast, number
from sgl_npu.passes.fx_ops import DIVISIONS, MULTIPLICATIONS, aten, is_one_per_row, same_shape
from sgl_npu.passes.match_binary import binary
from sgl_npu.passes.match_fold import Fold
from sgl_npu.passes.match_idle import Users, score_views, used_elsewhere, without_shift
from sgl_npu.passes.match_softmax import Softmax
from sgl_npu.passes.match_terms import SHAPING, Filled, Term, additive_terms, filled
from sgl_npu.passes.site import Refusal
from sgl_npu.runtime.sizes import Size, known

PRODUCTS = (aten.bmm.default, aten.mm.default, aten.matmul.default)
_SCALINGS = (*MULTIPLICATIONS, *DIVISIONS)
_LOWEST = torch.finfo(torch.float16).min  # clamping scores at this or less changes none of them
_CLAMPS = (aten.maximum.default, aten.clamp.default, aten.clamp_min.default)


@dataclass(frozen=True)
class Factor:
    """A tensor or a number known at run time that multiplies, or divides, the scores and is the same for every key."""

    node: fx.Node
    level: tuple[Size, ...]
    divides: bool


@dataclass(frozen=True)
class Scores:
    """The normal form. `levels` are the shapes that the scores have on the way, outermost first.

    The product has keys for rows where `swapped`, and more rows than queries where there is a `fold`. `lse` are the
    nodes that take the logarithm of the sum of the scores' exponentials beside the softmax. `batch` are the leading
    dimensions of the product, to which matmul broadcasts its operands.
    """

    levels: tuple[tuple[Size, ...], ...]
    scale: float = 1.0
    softcap: float = 0.0
    factors: tuple[Factor, ...] = ()
    terms: tuple[Term, ...] = ()
    sinks: fx.Node | None = None
    sinks_first: bool = False
    lse: tuple[fx.Node, ...] = ()
    product: tuple[fx.Node, fx.Node] | None = None
    batch: tuple[Size, ...] = ()
    swapped: bool = False
    fold: Fold | None = None

    @property
    def plain(self) -> bool:
        """Whether rows and keys are still where the softmax has them."""
        return not self.swapped and self.fold is None

    def plus(self, *terms: Term) -> Scores:
        return replace(self, terms=(*self.terms, *terms))

    def counts_constants(self) -> bool:
        """Whether a number added to every score changes anything: a softmax alone does not see it."""
        return self.sinks is not None or bool(self.lse)

    def times(self, factor: float) -> Scores:
        return replace(self, scale=self.scale * factor)


def read_scores(softmax: Softmax) -> Scores | Refusal:
    """The scores that go into a softmax."""
    lse = _logarithms(softmax.scores)
    node, users = _bare(softmax.scores, (*softmax.start, *lse), lse)
    if isinstance(node, Refusal):
        return node
    if node.target is not aten.cat.default:
        return _walk(node, users, Scores((tuple(node.meta["val"].shape),), lse=lse))
    if (refusal := used_elsewhere(node, tuple(user for user in users if user not in lse))) is not None:
        return refusal
    parts, dim, rank = node.args[0], (node.args[1] if len(node.args) > 1 else 0), node.meta["val"].dim()
    found: Scores | Refusal | None = None
    for scores, column in (parts, parts[::-1]) if len(parts) == 2 and dim % rank == rank - 1 else ():
        if known(column.meta["val"].size(-1) == 1) and not isinstance(found, Scores):
            start = Scores((tuple(scores.meta["val"].shape),), sinks=column, sinks_first=column is parts[0])
            found = _walk(scores, (node,), start)
    return found or Refusal("the scores are concatenated of parts that are not scores and one column of sinks", node)


def _bare(node: fx.Node, users: Users, lse: Users) -> tuple[fx.Node | Refusal, Users]:
    """What is behind casts and a subtracted maximum, and the users it may have."""
    while True:
        if is_float_cast(node):
            if (refusal := used_elsewhere(node, users)) is not None:
                return refusal, users
            node, users = node.args[0], (node, *lse)
            continue
        inner, allowed = without_shift(node, users)
        if inner is node:
            return node, users
        node, users = inner, allowed


def _logarithms(node: fx.Node) -> Users:
    """What takes logsumexp of the scores, before or after they are cast."""
    found = [user for user in node.users if _is_lse(user)]
    while is_float_cast(node):
        node = node.args[0]
        found += [user for user in node.users if _is_lse(user)]
    return tuple(found)


def _is_lse(node: fx.Node) -> bool:
    """logsumexp over the last dimension."""
    if node.target is not aten.logsumexp.default:
        return False
    rank = node.args[0].meta["val"].dim()
    return [dim % rank for dim in node.args[1]] == [rank - 1]


def _walk(node: fx.Node, users: Users, scores: Scores) -> Scores | Refusal:
    """Take the ops off one by one down to the product."""
    while True:
        if (refusal := used_elsewhere(node, users)) is not None:
            return refusal
        if node.target is aten.sub.Tensor and scores.softcap == 0.0 and not scores.counts_constants():
            inner, allowed = without_shift(node, users)
            if inner is not node:
                node, users = inner, allowed
                continue
        if node.target in PRODUCTS:
            return replace(scores, product=(node.args[0], node.args[1]), batch=tuple(node.meta["val"].shape[:-2]))
        if node.target is aten.baddbmm.default:
            return _batched_sum(node, scores)
        if node.target is aten.add.Tensor and scores.plain:
            return _sum(node, scores)
        if view_source(node) is not None:
            view = score_views(node)
            if isinstance(view, Refusal):
                return view
            node, users = view.chain[-1], (view.chain[-2],)
            if not view.plain and not scores.plain:
                return Refusal("the scores are transposed or folded twice", node)
            if view.plain:
                scores = replace(scores, levels=(*scores.levels, tuple(node.meta["val"].shape)))
            else:
                scores = replace(scores, swapped=view.swapped, fold=view.fold)
            continue
        if not scores.plain and node.target not in (*CASTS, *_SCALINGS):
            return Refusal("the scores are transposed or folded after more than a product and a scale", node)
        step = _step(node, scores)
        if isinstance(step, Refusal):
            return step
        users = (node,)
        node, scores = step


def _step(node: fx.Node, scores: Scores) -> tuple[fx.Node, Scores] | Refusal:
    """One op off: the scores inside it and what it does to them."""
    if is_float_cast(node):
        return node.args[0], scores
    if node.target is aten.tanh.default:
        return _capped(node, scores)
    if node.target in _SCALINGS:
        return _scaled(node, scores)
    if scores.softcap == 0.0:
        found = filled(node)
        if found is not None and isinstance(found.rest, fx.Node) and same_shape(node, found.rest):
            if scores.scale <= 0 or (scores.factors and found.fill != -math.inf):
                return Refusal("the mask is filled in before a scale that may be negative", node)
            if found.fill * scores.scale > MASKED:
                return Refusal(f"masked scores are {found.fill * scores.scale:g}: too much to forbid a key", node)
            return found.rest, scores.plus(found.term(scores.levels[-1], scores.scale, replaces=True))
        if node.target in _CLAMPS and _clamps_nothing(node):
            return node.args[0], scores
        if node.target is aten.sub.Tensor and _is_scores(node, node.args[0]) and isinstance(node.args[1], fx.Node):
            if node.kwargs.get("alpha", 1) != 1 or not isinstance(node.args[1].meta["val"], torch.Tensor):
                return Refusal("a difference with a factor of its own, or with a number known at run time only", node)
            terms = additive_terms(node.args[1], scores.levels[-1], -scores.scale, len(scores.factors))
            return node.args[0], scores.plus(*terms)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return Refusal(f"masked scores are filled with {node.args[2]}, not with a number that forbids a key", node)
    return Refusal(f"the scores come from {_name(node)}, which is no step of a softmax attention", node)


def _is_scores(node: fx.Node, operand: Any) -> bool:
    return isinstance(operand, fx.Node) and same_shape(node, operand)


def _clamps_nothing(node: fx.Node) -> bool:
    """Clamping from below at a number that is as good as forbidden."""
    low = number(node.args[1]) if len(node.args) > 1 else None
    return low is not None and low <= _LOWEST and len(node.args) < 3 and _is_scores(node, node.args[0])


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
            dtype = node.meta["val"].dtype if scores.scale == 1.0 else None
            terms = additive_terms(term, scores.levels[-1], scores.scale, len(scores.factors), dtype)
        elif number(term) == 0.0 or (number(term) is not None and not scores.counts_constants()):
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
    if beta != 0 and not scores.plain:
        return Refusal("a term is added before the scores are transposed or folded", node)
    if not all(isinstance(x, (int, float)) for x in (beta, alpha)):
        return Refusal("baddbmm with a factor that is known at run time only", node)
    if beta != 0 and scores.softcap != 0.0:
        return Refusal("a term is added inside the softcap", node)
    inside = len(scores.factors)
    terms = additive_terms(term, scores.levels[-1], scores.scale * beta, inside) if beta != 0 else []
    batch = tuple(node.meta["val"].shape[:-2])
    return replace(scores.plus(*terms).times(float(alpha)), product=(left, right), batch=batch)


def _scaled(node: fx.Node, scores: Scores) -> tuple[fx.Node, Scores] | Refusal:
    divides = node.target in DIVISIONS
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
        if isinstance(other, fx.Node) and _is_same_for_every_key(other) and (scores.plain or _is_one_number(other)):
            return inner, replace(scores, factors=(*scores.factors, Factor(other, scores.levels[-1], divides)))
        kept = None if divides or not scores.plain else _multiplied_by_mask(other, scores)
        if kept is not None:
            return inner, kept
    return Refusal("the scores are multiplied or divided by a tensor that differs from key to key", node)


def _is_same_for_every_key(node: fx.Node) -> bool:
    value = node.meta["val"]
    return not isinstance(value, torch.Tensor) or is_one_per_row(value)


def _multiplied_by_mask(node: Any, scores: Scores) -> Scores | None:
    """scores * m, m being 1 or 0 by a mask that was added already: what the mask forbids is its fill and no more."""
    found = binary(node, SHAPING)
    if found is None or (found.yes, found.no) not in ((1.0, 0.0), (0.0, 1.0)):
        return None
    mask = Filled(found.condition, found.no == 1.0, None, 0.0).term(scores.levels[-1], shaping=found.shaping)
    for place, term in enumerate(scores.terms):
        if term.is_mask and (term.node, term.negated, term.shaping) == (mask.node, mask.negated, mask.shaping):
            before, after = scores.terms[:place], scores.terms[place + 1 :]
            return replace(scores, terms=(*before, replace(term, replaces=True), *after))
    return None


def _is_one_number(node: fx.Node) -> bool:
    value = node.meta["val"]
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def _capped(node: fx.Node, scores: Scores) -> tuple[fx.Node, Scores] | Refusal:
    """cap * tanh(x): what multiplied the scores so far is the cap, and x is scores / cap."""
    if scores.softcap != 0.0 or scores.factors:
        return Refusal("a tanh whose cap is known at run time only, or two of them", node)
    if scores.scale <= 0.0:
        return Refusal(f"a tanh times {scores.scale}: no softcap", node)
    return node.args[0], replace(scores, softcap=scores.scale, scale=scores.scale)


def _name(node: fx.Node) -> str:
    return f"{node.target._opname!r}" if hasattr(node.target, "_opname") else f"the {node.op} {node.name!r}"
