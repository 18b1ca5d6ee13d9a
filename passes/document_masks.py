"""What a mask says of documents: ids of tokens that are equal, and a band of their positions or of their rows.

    ids[b, i] == ids[b, j]                                          documents
    j <= i,  position[b, j] <= position[b, i],  i - j < 512, …      the sides of a band within them

Positions are taken to grow by 1 within a document; whoever uses what is found here looks at that.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import Tensor, fx

from sgl_npu.passes.band import BATCH, KEY, ROW
from sgl_npu.passes.index_space import shape_of
from sgl_npu.passes.index_values import WRAPPED, Fit
from sgl_npu.passes.mask import MaskProver, band_of
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.document_ends import LARGEST_POSITION
from sgl_npu.runtime.sizes import Size, known

_POSITION = sympy.Symbol("position", integer=True)  # of the row's token


@dataclass(frozen=True)
class Leaf:
    """A tensor of integers that is read at (b, i) or (i,); `index` has a number where a dimension is read at one."""

    node: fx.Node
    index: tuple[int | None, ...]

    @property
    def is_batched(self) -> bool:
        return None in self.index[:-1]

    def tokens(self, value: Tensor) -> Tensor:
        """(B, S) or (S,)."""
        return value[tuple(slice(None) if at is None else at for at in self.index)]


@dataclass(frozen=True)
class Documents:
    """`before` and `after` are the sides of the band within a document, None where open."""

    ids: Leaf
    positions: Leaf | None
    before: int | None
    after: int | None


def documents_of(site: AttentionSite, prover: MaskProver) -> Documents | Refusal:
    """What the mask and the band of a site say, if that is all they say."""
    mask = site.argument("mask")
    if mask is None or site.argument("bias") is not None:
        return Refusal("no mask of documents alone", site.node)
    query, key = site.tensor("query"), site.tensor("key")
    assert query is not None and key is not None
    if not known(query.size(2) == key.size(2)):
        return Refusal("queries and keys are not known to be the same tokens", site.node)
    lengths, band = prover.site_lengths(site), band_of(site)
    ids: set[Leaf] = set()
    positions: set[Leaf] = set()
    for given in prover.kept_conditions(site, prover.match(site)):
        condition = None if given is None else _without_overflow(given)
        leaves = None if condition is None else _leaves(condition, prover, (query.size(0), query.size(2)))
        if condition is None or leaves is None or len(leaves) != 1:
            return Refusal("a part of the mask is more than ids or positions of its tokens", mask)
        if _compares_ids(condition):
            ids |= leaves
            continue
        positions |= leaves
        distance = _by_distance(condition)
        sides = None if _POSITION in distance.free_symbols else lengths.band(distance)
        if sides is None or not band.take(sides):
            return Refusal("a part of the mask is no band of positions", mask)
    if len(ids) != 1 or len(positions) > 1:
        return Refusal("the mask compares ids of none, or of more than one tensor", mask)
    (own,) = ids
    if not own.is_batched and not known(query.size(0) == 1):
        return Refusal("the rows of a batch share their ids", mask)
    outer = (None if band.lower is None else -band.lower, band.upper)
    if any(side is not None and not (side.is_Integer and side >= 0) for side in outer):
        return Refusal("a token does not attend to itself, or the width of the band is no number", mask)
    before, after = (None if side is None else int(side) for side in outer)
    return Documents(own, next(iter(positions), None), before, after)


def _leaves(condition: sympy.Basic, prover: MaskProver, sizes: tuple[Size, Size]) -> set[Leaf] | None:
    """The tensors of integers in a condition that are read at the row or at the key; None if any is read otherwise.

    `sizes` are those of the batch and of a row: a tensor that is read at them and has more holds more than the tokens.
    """
    lengths = {BATCH: sizes[0], ROW: sizes[1], KEY: sizes[1]}
    found = set()
    for x in condition.atoms(AppliedUndef):
        node = prover.space.nodes.get(x.func.__name__)
        leading = x.args[:-1]
        plain = all(at.is_Integer or at == BATCH for at in leading) and leading.count(BATCH) <= 1
        if node is None or not x.args or x.args[-1] not in (ROW, KEY) or not plain:
            return None
        if not all(known(n == lengths.get(at, n)) for n, at in zip(shape_of(node), x.args, strict=True)):
            return None
        found.add(Leaf(node, (*(int(at) if at.is_Integer else None for at in leading), None)))
    return found


def _without_overflow(condition: sympy.Basic) -> sympy.Basic:
    """The condition without the notes that a dtype may not hold a number, where it does for positions below a limit."""

    def is_wrapped(x: sympy.Basic) -> bool:
        return isinstance(x, AppliedUndef) and x.func.__name__.startswith(WRAPPED)

    def opened(x: sympy.Basic) -> sympy.Basic:
        limits = torch.iinfo(getattr(torch, x.func.__name__.removeprefix(WRAPPED)))
        positions = {leaf.func: (-LARGEST_POSITION, LARGEST_POSITION) for leaf in x.args[0].atoms(AppliedUndef)}
        low, high = Fit(positions).interval(x.args[0])
        return x.args[0] if limits.min <= low and high <= limits.max else x

    return condition.replace(is_wrapped, opened)


def _compares_ids(condition: sympy.Basic) -> bool:
    """ids at the row == ids at the key."""
    if not isinstance(condition, sympy.Eq) or not all(isinstance(x, AppliedUndef) for x in condition.args):
        return False
    return {x.args[-1] for x in condition.args} == {ROW, KEY}


def _by_distance(condition: sympy.Basic) -> sympy.Basic:
    """A condition on positions within one document, which grow by 1, as one on the distance of row and key."""
    places = {x: _POSITION + (KEY - ROW if x.args[-1] == KEY else 0) for x in condition.atoms(AppliedUndef)}
    return condition.xreplace(places).replace(
        lambda x: isinstance(x, Relational), lambda x: x.func(sympy.expand(x.lhs - x.rhs), 0)
    )
