"""Masks that fill scores with a number that is low but finite: what they give to a row in which every key is filled.

Where a row keeps a key, a filled score is as good as -inf: its exponential is 0. Where it keeps none, the softmax is
that of the filled numbers, where the canonical op gives 0. So such a mask is

    a mask                                                                  if every row keeps a key, or sinks take all
    a mask, and rows without keys get the average back (`empty_rows.py`)    if nothing but one number fills a row
    a bias of 0 and the number, as in the model                             if the sum of biases is what the model has

and what is none of these is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.mask import MaskProver
from sgl_npu.passes.mask_parts import Part
from sgl_npu.passes.mask_rows import NEVER
from sgl_npu.passes.match_terms import Term
from sgl_npu.passes.site import Refusal


def settled(terms: Sequence[Term], prover: MaskProver) -> tuple[tuple[Term, ...], float | None] | Refusal:
    """The terms, masks that cannot be masks turned into biases; and the number that fills rows without keys, if any.

    Terms are in the order in which they are met from the softmax inwards: a later one was applied earlier.
    """
    masks = [term for term in terms if term.is_mask]
    finite = [term for term in masks if term.fills]
    if not finite or _every_row_keeps_a_key(masks, prover):
        return tuple(terms), None
    biased_later = any(not term.is_mask for term in terms[: max(map(terms.index, finite))])
    absorbs = all(term.absorbs for term in finite)
    same_fill = len({term.fill for term in masks}) == 1 and (len(masks) == 1 or all(term.replaces for term in masks))
    if same_fill and (absorbs or (masks[0].replaces and not biased_later)):
        return tuple(terms), masks[0].fill
    innermost = masks[-1]
    if any(term.replaces and (term is not innermost or not absorbs) for term in finite):
        return Refusal("a row without keys would get the softmax of the numbers that fill it", finite[0].node)
    return tuple(replace(term, is_mask=not term.fills) if term.is_mask else term for term in terms), None


def _every_row_keeps_a_key(masks: Sequence[Term], prover: MaskProver) -> bool:
    level = masks[0].level
    if any(term.node.meta["val"].dtype != torch.bool for term in masks):
        return False
    if any(len(term.level) != len(level) or [*map(str, term.level)] != [*map(str, level)] for term in masks):
        return False
    return prover.empty_rows([_part(term) for term in masks], level) == NEVER


def _part(term: Term) -> Part:
    views = tuple(view for view in term.shaping if view.target is not aten.expand.default)
    return Part(term.node, negated=term.negated, views=views)


def joined(
    terms: Sequence[Term], tensors: Sequence[Tensor], factors: Sequence[Callable[[Tensor], Tensor]], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """All masks in one conjunction and all biases in one sum. `dtype` is that of the scores."""
    mask = bias = None
    for term, x in zip(terms, tensors, strict=True):
        if term.is_mask or term.fills:
            x = x if x.dtype == torch.bool else x != 0
        if term.is_mask:
            x = torch.logical_not(x) if term.negated else x
            mask = x if mask is None else mask & x
            continue
        x = _as_bias(term, x, factors, dtype)
        bias = x if bias is None else bias + x
    return mask, bias


def _as_bias(term: Term, x: Tensor, factors: Sequence[Callable[[Tensor], Tensor]], dtype: torch.dtype) -> Tensor:
    if term.fills:
        wide = torch.float32 if term.fill < torch.finfo(dtype).min else dtype
        zero, low = (torch.full((), number, dtype=wide, device=x.device) for number in (0.0, term.fill))
        return torch.where(x, low, zero) if term.negated else torch.where(x, zero, low)
    x = x if x.is_floating_point() else x.float()
    x = x if term.factor == 1.0 else x * term.factor
    for multiply in factors[: term.inside]:
        x = multiply(x)
    return x
