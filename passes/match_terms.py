"""What is added to attention scores, as masks and biases.

where(c, 0, -inf), masked_fill(zeros, ~c, finfo.min), …   a mask: True where c may attend
where(c, b, -inf), masked_fill(b, ~c, -inf)               a mask c and a bias b
a + b                                                     both, where one of them is a mask
anything else                                             a bias
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from sgl_npu.passes.constants import CASTS, MASKED, forbids, number
from sgl_npu.passes.fx_ops import NEGATIONS, VIEWS, adds_leading_ones, aten
from sgl_npu.passes.match_binary import binary
from sgl_npu.runtime.sizes import Size, known

ABSORBS = -1e30  # x + score is x for this and less, in every dtype that holds it
# Likewise in float16, whose numbers here are 32 apart, for scores between -16 and 16, as models have them. Larger ones
# take a row without keys to themselves, which is as little meant as the average.
LOWEST_HALF = torch.finfo(torch.float16).min
SHAPING = (aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default, aten.alias.default)


@dataclass(frozen=True)
class Term:
    """A tensor that decides over scores of the shape `level`, whose last two dimensions are rows and keys.

    A mask is bool, True = may attend, or False where `negated`; the others get `fill`, added to their score or, where
    `replaces`, instead of it. A bias is multiplied by `factor` and by the first `inside` factors of the scores that are
    tensors. `shaping` are the ops, outermost first, that the model applied to the tensor after the comparison that is
    the mask.
    """

    node: fx.Node
    level: tuple[Size, ...]
    is_mask: bool
    negated: bool = False
    factor: float = 1.0
    inside: int = 0
    shaping: tuple[fx.Node, ...] = ()
    fill: float = -math.inf
    replaces: bool = False
    swallows: bool = False  # the sum is rounded to the fill, though the fill is no lower than ABSORBS

    @property
    def absorbs(self) -> bool:
        """Whether a score plus the fill is the fill."""
        return self.swallows or self.fill <= ABSORBS

    @property
    def fills(self) -> bool:
        """Whether it fills scores with a number that is low, but finite."""
        return self.fill != -math.inf


@dataclass(frozen=True)
class Filled:
    """A node that is `fill` where `condition` holds, or fails where not `forbids`, and `rest` elsewhere."""

    condition: fx.Node
    forbids: bool
    rest: object
    fill: float

    def term(self, level: Sequence[Size], factor: float = 1.0, replaces: bool = False, shaping: tuple = ()) -> Term:
        """The mask that it is to scores, its negations counted instead of computed."""
        node, negated = self.condition, self.forbids
        while node.target in NEGATIONS and node.args[0].meta["val"].dtype == torch.bool:
            node, negated = node.args[0], not negated
        fill = self.fill * factor
        return Term(node, tuple(level), True, negated, shaping=shaping, fill=fill, replaces=replaces)


def additive_terms(
    node: fx.Node, level: Sequence[Size], factor: float, inside: int = 0, dtype: torch.dtype | None = None
) -> list[Term]:
    """What `scores + factor * node` does to the scores. `dtype` is that of the sum, where nothing scales it later.

    Times a number that may be negative, a mask is a mere bias; but for -inf, which only a positive one leaves finite.
    """
    bias = Term(node, tuple(level), False, factor=factor, inside=inside)
    found = _split(node, bias, ()) if factor > 0 else _arithmetic_mask(node, bias, ())
    masks = [term for term in found or () if term.is_mask]
    weak = any(term.fill > MASKED for term in masks)
    if found is None or weak or (inside and any(term.fills for term in masks)):
        return [bias]
    if dtype == torch.float16:
        return [replace(term, swallows=term.is_mask and term.fill <= LOWEST_HALF) for term in found]
    return found


def _split(node: fx.Node, bias: Term, shaping: tuple[fx.Node, ...]) -> list[Term] | None:
    """The terms of a sum that holds a mask; None where no mask is found. `bias` is what the whole would be else."""
    inner, shaping = _behind_shaping(node, shaping)
    if inner.target is aten.add.Tensor and inner.kwargs.get("alpha", 1) == 1 and not shaping:
        parts = [x for x in inner.args if isinstance(x, fx.Node)]
        found = [_split(x, bias, ()) for x in parts]
        if len(parts) < 2 or all(terms is None for terms in found):
            return None
        biases = [[replace(bias, node=x)] for x in parts]
        return [t for terms, bias in zip(found, biases, strict=True) for t in (bias if terms is None else terms)]
    split = filled(inner)
    if split is None:
        return _arithmetic_mask(inner, bias, shaping)
    rest = split.rest
    if number(rest) == 0.0:
        return [split.term(bias.level, bias.factor, shaping=shaping)]
    if shaping or not isinstance(rest, fx.Node) or not rest.meta["val"].is_floating_point():
        return None
    if split.fill * bias.factor > ABSORBS:
        return None  # a row of such fills would get the rest beside them
    inner_terms = _split(rest, bias, ()) or [replace(bias, node=rest)]
    return [split.term(bias.level, bias.factor), *inner_terms]


def _behind_shaping(node: fx.Node, shaping: tuple[fx.Node, ...]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    while node.target in (*SHAPING, *CASTS, *VIEWS):
        if node.target in CASTS:
            if not node.args[0].meta["val"].is_floating_point():
                break
        elif node.target in VIEWS:
            if not adds_leading_ones(node):
                break
        elif node.target not in (aten.clone.default, aten.alias.default):
            shaping = (*shaping, node)
        node = node.args[0]
    return node, shaping


def filled(node: fx.Node) -> Filled | None:
    """What a node is made of that is a forbidding number by a condition."""
    found = _conditional(node, forbids)
    if found is None:
        return None
    lowest = torch.finfo(node.meta["val"].dtype).min
    return found if found.fill >= lowest else replace(found, fill=-math.inf)  # what the dtype makes of it


def _arithmetic_mask(node: fx.Node, bias: Term, shaping: tuple[fx.Node, ...]) -> list[Term] | None:
    """A mask of 0 and a number that is computed from a condition, and that forbids with the sign of its factor."""
    found = binary(node, SHAPING)
    if found is None or 0.0 not in (found.yes, found.no):
        return None
    fill = (found.yes + found.no) * math.copysign(1.0, bias.factor)
    if not forbids(fill):
        return None
    mask = Filled(found.condition, found.no == 0.0, 0.0, fill)
    return [mask.term(bias.level, abs(bias.factor), shaping=(*shaping, *found.shaping))]


def blanked(node: fx.Node) -> Filled | None:
    """What a node is made of that is 0 by a condition."""
    return _conditional(node, lambda value: number(value) == 0.0)


def _conditional(node: fx.Node, is_fill: Callable[[object], bool]) -> Filled | None:
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        rest, condition, fill = node.args
        return Filled(condition, True, rest, number(fill) or 0.0) if is_fill(fill) else None
    if node.target is not aten.where.self or is_fill(node.args[1]) == is_fill(node.args[2]):
        return None
    condition, one, other = node.args
    fill, rest = (one, other) if is_fill(one) else (other, one)
    return Filled(condition, is_fill(one), rest, number(fill) or 0.0)


def shaped(x: Tensor, shaping: Sequence[fx.Node]) -> Tensor:
    """The model's own unsqueezes and slices of a mask, applied to the comparison; broadcasting is left to the op."""
    for node in reversed(shaping):
        rank = node.meta["val"].dim()
        if node.target is aten.unsqueeze.default:
            after_it = rank - 1 - node.args[1] % rank
            x = x.unsqueeze(-1 - after_it) if after_it <= x.dim() else x
        elif node.target is aten.slice.Tensor:
            dim = (node.args[1] if len(node.args) > 1 else 0) % rank - rank
            if -dim <= x.dim() and not known(x.size(dim) == 1):
                bounds = [y.meta["val"] if isinstance(y, fx.Node) else y for y in node.args[2:]]
                x = torch.ops.aten.slice.Tensor(x, dim, *bounds)
    return x
