"""What is added to attention scores, as masks and biases.

where(c, 0, -inf), masked_fill(zeros, ~c, finfo.min), …   a mask: True where c may attend
where(c, b, -inf), masked_fill(b, ~c, -inf)               a mask c and a bias b
a + b                                                     both, where one of them is a mask
anything else                                             a bias
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sgl_npu.passes.constants import CASTS, forbids, number
from sgl_npu.passes.fx_ops import aten
from sgl_npu.runtime.sizes import Size, known

_SHAPING = (aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default, aten.alias.default)
_NEGATIONS = (aten.bitwise_not.default, aten.logical_not.default)


@dataclass(frozen=True)
class Term:
    """A tensor that decides over scores of the shape `level`, whose last two dimensions are rows and keys.

    A mask is bool, True = may attend, or False where `negated`. A bias is multiplied by `factor` and by the first
    `inside` factors of the scores that are tensors. `shaping` are the ops, outermost first, that the model applied to
    the tensor after the comparison that is the mask.
    """

    node: fx.Node
    level: tuple[Size, ...]
    is_mask: bool
    negated: bool = False
    factor: float = 1.0
    inside: int = 0
    shaping: tuple[fx.Node, ...] = ()


def mask_term(node: fx.Node, level: Sequence[Size], negated: bool, shaping: tuple[fx.Node, ...] = ()) -> Term:
    """A mask, its negations counted instead of computed."""
    while node.target in _NEGATIONS and node.args[0].meta["val"].dtype == torch.bool:
        node, negated = node.args[0], not negated
    return Term(node, tuple(level), True, negated, shaping=shaping)


def additive_terms(node: fx.Node, level: Sequence[Size], factor: float, inside: int = 0) -> list[Term]:
    """What `scores + factor * node` does to the scores. Times a number that may be negative, a mask is a mere bias."""
    found = _split(node, tuple(level), factor, ()) if factor > 0 and inside == 0 else None
    return [Term(node, tuple(level), False, factor=factor, inside=inside)] if found is None else found


def _split(node: fx.Node, level: tuple[Size, ...], factor: float, shaping: tuple[fx.Node, ...]) -> list[Term] | None:
    """The terms of a sum that holds a mask; None where no mask is found."""
    inner, shaping = _behind_shaping(node, shaping)
    if inner.target is aten.add.Tensor and inner.kwargs.get("alpha", 1) == 1 and not shaping:
        parts = [x for x in inner.args if isinstance(x, fx.Node)]
        found = [_split(x, level, factor, ()) for x in parts]
        if len(parts) < 2 or all(terms is None for terms in found):
            return None
        biases = [[Term(x, level, False, factor=factor)] for x in parts]
        return [t for terms, bias in zip(found, biases, strict=True) for t in (bias if terms is None else terms)]
    split = filled(inner)
    if split is None:
        return None
    condition, negated, rest = split
    if number(rest) == 0.0:
        return [mask_term(condition, level, negated, shaping)]
    if shaping or not isinstance(rest, fx.Node) or not rest.meta["val"].is_floating_point():
        return None
    inner_terms = _split(rest, level, factor, ()) or [Term(rest, level, False, factor=factor)]
    return [mask_term(condition, level, negated), *inner_terms]


def _behind_shaping(node: fx.Node, shaping: tuple[fx.Node, ...]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    while node.target in (*_SHAPING, *CASTS):
        if node.target in CASTS:
            if not node.args[0].meta["val"].is_floating_point():
                break
        elif node.target not in (aten.clone.default, aten.alias.default):
            shaping = (*shaping, node)
        node = node.args[0]
    return node, shaping


def filled(node: fx.Node) -> tuple[fx.Node, bool, object] | None:
    """(condition, whether it says what to forbid, the rest) of a node that is a forbidding number by a condition."""
    if node.target is aten.where.self:
        condition, one, other = node.args
        if forbids(one) == forbids(other):
            return None
        return (condition, True, other) if forbids(one) else (condition, False, one)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and forbids(node.args[2]):
        return node.args[1], True, node.args[0]
    return None


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


def joined(
    terms: Sequence[Term], tensors: Sequence[Tensor], factors: Sequence[Callable[[Tensor], Tensor]]
) -> tuple[Tensor | None, Tensor | None]:
    """All masks in one conjunction and all biases in one sum."""
    mask = bias = None
    for term, x in zip(terms, tensors, strict=True):
        if term.is_mask:
            x = torch.logical_not(x) if term.negated else x
            mask = x if mask is None else mask & x
            continue
        x = x if x.is_floating_point() else x.float()
        x = x if term.factor == 1.0 else x * term.factor
        for multiply in factors[: term.inside]:
            x = multiply(x)
        bias = x if bias is None else bias + x
    return mask, bias
