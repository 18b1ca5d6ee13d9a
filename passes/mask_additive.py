"""A float tensor added to the scores, taken apart: what of it is a mask, and what is a bias.

where(c, 0, -inf), masked_fill(zeros, ~c, finfo.min), full(-inf).triu(1), behind casts and views    a mask
where(c, x, -inf), masked_fill(x, ~c, -inf)                                                         a mask and a bias x
a + b                                                                                               what a and b are

-inf forbids a key for good, so that mask and bias mean the same. A finite number forbids a key beside others, but a row
of nothing else is the mean of its values: it is a mask only where no row can be without a key (`mask_rows.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx

from sgl_npu.passes.band import coordinates
from sgl_npu.passes.constants import CASTS, number
from sgl_npu.passes.fx_ops import aten, is_float
from sgl_npu.passes.index_space import IndexSpace
from sgl_npu.passes.index_values import Choice, Opaque, lifted
from sgl_npu.passes.mask_parts import COPIES, Part, are_bool, is_part_view, kept
from sgl_npu.passes.match_terms import Filled, filled


@dataclass(frozen=True)
class Addend:
    """One term of a sum of float tensors: parts of a mask, and what is left as a bias.

    `finite`: some number that forbids is not -inf.
    """

    term: Part
    parts: tuple[Part, ...] = ()
    rest: Part | None = None
    finite: bool = False

    def kept_whole(self) -> Addend:
        return Addend(self.term, rest=self.term)


def addends(term: Part, space: IndexSpace) -> list[Addend]:
    """The terms of a bias. One that holds no mask is its own rest."""
    node = term.node
    if _is_sum(node) and all(is_float(x) for x in node.args):
        return [addend for x in node.args for addend in addends(replace(term, node=x), space)]
    if is_part_view(node):
        return addends(_behind(term), space)
    return [_taken_apart(term, space) or Addend(term, rest=term)]


def _behind(view: Part) -> Part:
    inner: Any = view.node.args[0]
    return replace(view, node=inner, views=(*view.views, view.node))


def _taken_apart(term: Part, space: IndexSpace) -> Addend | None:
    """None for a term that holds no mask. What is behind copies or casts is a mask and nothing else, or none."""
    node = term.node
    inner: Any = node.args[0] if node.args else None
    if number(node) == 0.0:
        return Addend(term)
    if node.target in (*COPIES, *CASTS) and is_float(inner):
        return _whole(_taken_apart(replace(term, node=inner), space), term)
    if is_part_view(node):
        return _whole(_taken_apart(_behind(term), space), term)
    if _is_sum(node) and all(is_float(x) for x in node.args):
        found = [_whole(_taken_apart(replace(term, node=x), space), term) for x in node.args]
        masks = [addend for addend in found if addend is not None]
        return _joined(term, *masks) if len(masks) == len(found) else None
    split = filled(node)
    if split is not None and are_bool(node, split.condition):
        return _filled(term, split, space)
    return _all_forbid_or_keep(term, space)


def _filled(term: Part, split: Filled, space: IndexSpace) -> Addend | None:
    condition = Part(split.condition, split.forbids, term.views)
    mask = Addend(term, (condition,), None, split.fill != -math.inf)
    if number(split.rest) == 0.0:
        return mask
    if not is_float(split.rest):
        return None
    bias = replace(term, node=split.rest)
    return _joined(term, mask, _taken_apart(bias, space) or Addend(bias, rest=bias))


def _all_forbid_or_keep(term: Part, space: IndexSpace) -> Addend | None:
    """A term that is 0 or forbids at every position, whatever op made it."""
    try:
        value = space.at(term.node, coordinates(term.node.meta["val"].dim()))
        lifted(kept, value)
    except Opaque:
        return None
    return Addend(term, (term,), None, any(x.is_Integer and x < 0 for x in _outcomes(value)))


def _outcomes(value: sympy.Basic) -> list[sympy.Basic]:
    if isinstance(value, Choice):
        return [x for branch in value.args[1:] for x in _outcomes(branch)]
    return [value]


def _joined(term: Part, *found: Addend) -> Addend:
    rests = [addend.rest for addend in found if addend.rest is not None]
    assert len(rests) <= 1
    parts = tuple(part for addend in found for part in addend.parts)
    return Addend(term, parts, rests[0] if rests else None, any(addend.finite for addend in found))


def _whole(addend: Addend | None, term: Part) -> Addend | None:
    return None if addend is None or addend.rest is not None else replace(addend, term=term)


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1
