"""Prove what a mask tensor means: the band it says, and the smallest tensor for what is not proved.

before: attention(query, key, value, mask (B, 1, Sq, Skv)) with mask = (j <= i) & padding[b, j]
after:  attention(query, key, value, padding (B, 1, 1, Skv), upper=0)

The mask is taken apart where it is a conjunction, and each part is read in index space (`index_space.py`). A part
that is a relation of j - i becomes a side of the band; one that always holds goes; any other part stays a tensor, cut
down to the dimensions it depends on. Proofs hold for every size: nothing is guarded, nothing is guessed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from sgl_npu.passes.fx_ops import aten, insert_op
from sgl_npu.passes.index_space import IndexSpace, Opaque, size_expression
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.sizes import Size, known

_BATCH, _HEAD, _ROW, _KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "i", "j"))
_COORDINATES = (_BATCH, _HEAD, _ROW, _KEY)
_CONJUNCTIONS = (aten.bitwise_and.Tensor, aten.logical_and.default)


@dataclass
class Match:
    """A band, and the parts of the mask that stay tensors."""

    site: AttentionSite
    lower: sympy.Expr | None = None
    upper: sympy.Expr | None = None
    rest: list[fx.Node] = field(default_factory=list)


class MaskProver:
    """Proofs over one graph; equal masks are proved and rebuilt once."""

    def __init__(self) -> None:
        self.space = IndexSpace()
        self.symbols: dict[sympy.Symbol, fx.Node] | None = None
        self.built: dict[tuple[fx.Node, ...], fx.Node] = {}

    def match(self, site: AttentionSite) -> Match | Refusal:
        mask = site.argument("mask")
        if mask is None:
            return Refusal("no mask tensor", site.node)
        if site.lower is not None or site.upper is not None:
            return Refusal("the site has a band beside its mask already", site.node)
        query, key = site.tensor("query"), site.tensor("key")
        assert query is not None and key is not None
        match, facts = Match(site), _Ranges(query.shape[2], key.shape[2])
        for part in _parts(mask):
            sides = self._prove(part, facts)
            if sides is None or not match_sides(match, sides):
                match.rest.append(part)
        if match.lower is None and match.upper is None and len(match.rest) == len(list(_parts(mask))):
            return Refusal("no part of the mask is a band", mask)
        if not all(self._has_node(side, site.node.graph) for side in (match.lower, match.upper) if side is not None):
            return Refusal("a side of the band is in sizes that the graph does not get as inputs", mask)
        return match

    def _prove(self, part: fx.Node, facts: _Ranges) -> list[tuple[str, sympy.Expr]] | None:
        """The sides of the band that a part says, none if it always holds, None if it says anything else."""
        value = self._at(part)
        sides = []
        for clause in sympy.And.make_args(value):
            if facts.always(clause):
                continue
            found = _band_sides(clause)
            if found is None:
                return None
            sides += found
        return sides

    def _at(self, part: fx.Node) -> sympy.Basic:
        return self.space.operand(part, _COORDINATES)

    def rewrite(self, match: Match) -> None:
        site = match.site
        rest = self._rest(match)
        node = site.node
        sides = {"lower": match.lower, "upper": match.upper}
        built = {name: self._size(side, node) for name, side in sides.items() if side is not None}
        if rest is None:
            site.clear_argument("mask")
        else:
            site.set_argument("mask", rest)
        node.kwargs = {**node.kwargs, **built}

    def _rest(self, match: Match) -> fx.Node | None:
        """The remaining parts, each as small as its dependence allows, joined; shared by the sites that share them."""
        key = tuple(match.rest)
        if key and key not in self.built:
            joined = None
            for part in match.rest:
                small = self._shrunk(part, match.site.node)
                joined = small if joined is None else insert_op(match.site.node, _CONJUNCTIONS[0], (joined, small))
            assert joined is not None
            self.built[key] = joined
        return self.built.get(key)

    def _shrunk(self, part: fx.Node, anchor: fx.Node) -> fx.Node:
        """The part cut to one entry along every dimension its value does not depend on."""
        used = self._at(part).free_symbols
        rank = part.meta["val"].dim()
        for dim, coordinate in enumerate(_COORDINATES[4 - rank :]):
            if coordinate not in used and not known(part.meta["val"].size(dim) == 1):
                part = insert_op(anchor, aten.slice.Tensor, (part, dim, 0, 1))
        return part

    def _has_node(self, side: sympy.Expr, graph: fx.Graph) -> bool:
        if self.symbols is None:
            placeholders = graph.find_nodes(op="placeholder")
            values = [(node, node.meta.get("val")) for node in placeholders]
            self.symbols = {x.node.expr: node for node, x in values if isinstance(x, torch.SymInt)}
        simple = all(x.is_Symbol or x.is_Integer or x.is_Add or x.is_Mul for x in sympy.preorder_traversal(side))
        return simple and all(symbol in self.symbols for symbol in side.free_symbols)

    def _size(self, side: sympy.Expr, anchor: fx.Node) -> int | fx.Node:
        """A sum or product of sizes as a node of the graph, a number as itself."""
        if side.is_Integer:
            return int(side)
        if side.is_Symbol:
            assert self.symbols is not None
            return self.symbols[side]
        combine = operator.add if side.is_Add else operator.mul
        result: int | fx.Node | None = None
        for term in side.args:
            part = self._size(term, anchor)
            result = part if result is None else insert_op(anchor, combine, (result, part))
        assert result is not None
        return result


def match_sides(match: Match, sides: list[tuple[str, sympy.Expr]]) -> bool:
    """Take sides into the band. False, and nothing taken, where two bounds cannot be put in order for every size."""
    taken = {"lower": match.lower, "upper": match.upper}
    for name, bound in sides:
        old = taken[name]
        if old is None or old == bound:
            taken[name] = bound
            continue
        difference = sympy.expand(bound - old)
        if not difference.is_number:
            return False
        tighter = difference > 0 if name == "lower" else difference < 0
        taken[name] = bound if tighter else old
    match.lower, match.upper = taken["lower"], taken["upper"]
    return True


def _parts(mask: fx.Node):
    """The nodes whose conjunction the mask is, each broadcastable to the mask. Broadcasting is looked through."""
    if mask.target in _CONJUNCTIONS and all(_is_bool(x) for x in mask.args):
        for operand in mask.args:
            yield from _parts(operand)  # type: ignore[arg-type]
    elif mask.target in (aten.expand.default, aten.alias.default, aten.clone.default) or _is_whole_slice(mask):
        yield from _parts(mask.args[0])  # type: ignore[arg-type]
    else:
        yield mask


def _is_bool(argument: object) -> bool:
    return isinstance(argument, fx.Node) and argument.meta["val"].dtype == torch.bool


def _is_whole_slice(node: fx.Node) -> bool:
    """A slice that takes everything."""
    if node.target is not aten.slice.Tensor:
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return all(known(a == b) for a, b in zip(before, after, strict=True))


@dataclass(frozen=True)
class _Ranges:
    """i runs over the queries and j over the keys; what follows for linear expressions in them."""

    rows: Size
    keys: Size

    def always(self, clause: sympy.Basic) -> bool:
        """Whether a relation holds for every i and j and every size."""
        if clause == sympy.true:
            return True
        bound = _as_bound(clause)
        if bound is None:
            return False
        try:
            largest = self._largest(bound)
        except Opaque:
            return False
        return largest is not None and _known_nonpositive(largest, (self.rows, self.keys))

    def _largest(self, expression: sympy.Expr) -> sympy.Expr | None:
        for symbol, size in ((_ROW, self.rows), (_KEY, self.keys)):
            slope = sympy.diff(expression, symbol)
            if slope.free_symbols or not slope.is_number:
                return None
            extreme = size_expression(size) - 1 if slope > 0 else sympy.Integer(0)
            expression = expression.subs(symbol, extreme)
        unknown = expression.free_symbols & {_BATCH, _HEAD}
        return None if unknown or expression.has(sympy.core.function.AppliedUndef) else sympy.expand(expression)


def _as_bound(clause: sympy.Basic) -> sympy.Expr | None:
    """The e of a relation that says e <= 0, over integers."""
    if isinstance(clause, (sympy.Le, sympy.Lt)):
        bound = clause.lhs - clause.rhs + int(isinstance(clause, sympy.Lt))
    elif isinstance(clause, (sympy.Ge, sympy.Gt)):
        bound = clause.rhs - clause.lhs + int(isinstance(clause, sympy.Gt))
    else:
        return None
    bound = sympy.expand(bound)
    return bound if bound.is_polynomial(_ROW, _KEY) else None


def _band_sides(clause: sympy.Basic) -> list[tuple[str, sympy.Expr]] | None:
    """[("upper", u)] for j - i <= u, [("lower", l)] for j - i >= l, both for equality; None for anything else."""
    if isinstance(clause, sympy.Eq):
        pair = [_band_sides(relation(clause.lhs, clause.rhs)) for relation in (sympy.Le, sympy.Ge)]
        return None if None in pair else [side for sides in pair for side in sides]  # type: ignore[union-attr]
    bound = _as_bound(clause)
    if bound is None:
        return None
    slopes = sympy.diff(bound, _KEY), sympy.diff(bound, _ROW)
    rest = sympy.expand(bound - slopes[0] * _KEY - slopes[1] * _ROW)
    if rest.free_symbols & set(_COORDINATES) or rest.has(sympy.core.function.AppliedUndef, sympy.Piecewise):
        return None
    if slopes == (1, -1):
        return [("upper", -rest)]
    return [("lower", rest)] if slopes == (-1, 1) else None


def _known_nonpositive(expression: sympy.Expr, sizes: tuple[Size, ...]) -> bool:
    """Whether an expression of sizes is at most 0 whatever they are."""
    if expression.is_number:
        return bool(expression <= 0)
    symbolic = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    if symbolic is None:
        return False
    return known(symbolic.node.shape_env.create_symintnode(expression, hint=None) <= 0)
