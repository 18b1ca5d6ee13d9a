"""Prove what a mask tensor means: the band it says, and the smallest tensor for what is not proved.

before: attention(query, key, value, mask (B, 1, Sq, Skv)) with mask = (j <= i) & padding[b, j]
after:  attention(query, key, value, padding (B, 1, 1, Skv), upper=0)

The mask is taken apart where it is a conjunction, and each part is read in index space (`index_space.py`). A part that
is a band (`band.py`) becomes a side of it; one that always holds goes; any other part stays a tensor, cut down to the
dimensions it depends on. Proofs hold for every size: nothing is guarded, nothing is guessed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from sgl_npu.passes.band import COORDINATES, Lengths, Side
from sgl_npu.passes.fx_ops import aten, insert_op
from sgl_npu.passes.index_rules import RULES, before_slice, before_unsqueeze
from sgl_npu.passes.index_space import IndexSpace
from sgl_npu.passes.index_values import Opaque
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.sizes import Size, known

_AND = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor)
_OR = (aten.bitwise_or.Tensor, aten.logical_or.default, aten.add.Tensor)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)
_COPIES = (aten.expand.default, aten.alias.default, aten.clone.default, aten.detach.default, aten._to_copy.default)
_VIEWS = {aten.unsqueeze.default: before_unsqueeze, aten.slice.Tensor: before_slice}


@dataclass(frozen=True)
class Part:
    """A bool node of the graph, or its negation, behind views that the whole mask went through (outermost first)."""

    node: fx.Node
    negated: bool = False
    views: tuple[fx.Node, ...] = ()


@dataclass
class Match:
    """A band, and the parts of the mask that stay tensors."""

    site: AttentionSite
    lower: sympy.Expr | None = None
    upper: sympy.Expr | None = None
    rest: list[Part] = field(default_factory=list)


class MaskProver:
    """Proofs over one graph; equal masks are proved and rebuilt once."""

    def __init__(self) -> None:
        self.space = IndexSpace(RULES)
        self.sizes: dict[sympy.Symbol, tuple[fx.Node, int | None]] | None = None
        self.lengths: dict[tuple[str, str], Lengths] = {}
        self.proved: dict[tuple[Part, int], tuple[list[Side] | None, tuple[bool, ...]]] = {}
        self.built: dict[tuple[Any, ...], fx.Node | int] = {}

    def match(self, site: AttentionSite) -> Match | Refusal:
        mask = site.argument("mask")
        if mask is None:
            return Refusal("no mask tensor", site.node)
        if site.lower is not None or site.upper is not None:
            return Refusal("the site has a band beside its mask already", site.node)
        parts = list(dict.fromkeys(self._parts(Part(mask))))
        match, needed = Match(site), [False] * 4
        for part in parts:
            try:
                sides, depends = self._proof(part, site)
            except Opaque:
                return Refusal(
                    "a part of the mask is broadcast or sliced by sizes that are not known to match", part.node
                )
            if sides is None or not self._can_build(sides, site.node.graph) or not match_sides(match, sides):
                match.rest.append(part)
                needed = [one or other for one, other in zip(needed, depends, strict=True)]
        if match.rest == parts and needed == list(_present(Part(mask))):
            return Refusal("no part of the mask is a band, and it depends on every dimension it has", mask)
        return match

    def _parts(self, part: Part) -> Iterator[Part]:
        """The parts whose conjunction a part is, each broadcastable to it; broadcasts and copies are looked through."""
        node, negated = part.node, part.negated
        arguments: Any = node.args
        if node.target in _COPIES and _are_bool(node, arguments[0]):
            yield from self._parts(replace(part, node=arguments[0]))
        elif node.target in _NOT and _are_bool(node, arguments[0]):
            yield from self._parts(replace(part, node=arguments[0], negated=not negated))
        elif node.target in (_OR if negated else _AND) and _are_bool(node, *arguments):
            for operand in arguments:
                yield from self._parts(replace(part, node=operand))
        elif node.target in _VIEWS:
            yield from self._parts(replace(part, node=arguments[0], views=(*part.views, node)))
        elif (operands := self._chosen(node, negated)) is not None:
            for operand, other in operands:
                yield from self._parts(replace(part, node=operand, negated=other))
        else:
            yield part

    def _chosen(self, node: fx.Node, negated: bool) -> list[tuple[fx.Node, bool]] | None:
        """Two operands, negated or not, whose conjunction a where or masked_fill with a constant is."""
        if node.target is aten.where.self:
            condition, yes, no = node.args
        elif node.target is aten.masked_fill.Scalar:
            no, condition, yes = node.args
        else:
            return None
        tensors = [x for x in (condition, yes, no) if not isinstance(x, (bool, int))]
        if not _are_bool(node, *tensors):
            return None
        refused = sympy.sympify(negated)  # the constant under which nothing of the part is kept
        if self._constant(yes) == refused and no in tensors:
            return [(condition, True), (no, negated)]
        if self._constant(no) == refused and yes in tensors:
            return [(condition, False), (yes, negated)]
        return None

    def _constant(self, argument: Any) -> sympy.Basic | None:
        if not isinstance(argument, fx.Node):
            return sympy.sympify(bool(argument))
        rank = argument.meta["val"].dim()
        value = self.space.at(argument, COORDINATES[4 - rank :]) if rank <= 4 else None
        return value if value in (sympy.true, sympy.false) else None

    def _proof(self, part: Part, site: AttentionSite) -> tuple[list[Side] | None, tuple[bool, ...]]:
        """The sides of the band that a part says, None if it is none; and which of b, h, i, j it depends on."""
        lengths = self._lengths(site)
        key = (part, id(lengths))
        if key not in self.proved:
            self.proved[key] = self._prove(part, lengths, _full_shape(site))
        return self.proved[key]

    def _prove(
        self, part: Part, lengths: Lengths, shape: tuple[Size, ...]
    ) -> tuple[list[Side] | None, tuple[bool, ...]]:
        value = self._value(part, shape)
        depends = tuple(x in value.free_symbols and there for x, there in zip(COORDINATES, _present(part), strict=True))
        return lengths.band(sympy.Not(value) if part.negated else value), depends

    def _value(self, part: Part, shape: tuple[Size, ...]) -> sympy.Basic:
        """What the node says, before negation, at (b, h, i, j) of the shape the mask is broadcast to."""
        index: tuple[sympy.Expr, ...] = COORDINATES
        for view in part.views:
            outer = tuple(view.meta["val"].shape)
            index = _read_at(outer, shape, index)
            index = (
                before_unsqueeze(view, index) if view.target is aten.unsqueeze.default else before_slice(view, index)
            )
            shape = tuple(view.args[0].meta["val"].shape)
        return self.space.at(part.node, _read_at(tuple(part.node.meta["val"].shape), shape, index))

    def _lengths(self, site: AttentionSite) -> Lengths:
        *_, rows, keys = _full_shape(site)
        key = (str(rows), str(keys))
        if key not in self.lengths:
            mode = getattr(site.tensor("query"), "fake_mode", None)
            self.lengths[key] = Lengths(rows, keys, getattr(mode, "shape_env", None))
        return self.lengths[key]

    def rewrite(self, match: Match) -> None:
        site = match.site
        sides = {"lower": match.lower, "upper": match.upper}
        built = {name: self._size(side, site.node) for name, side in sides.items() if side is not None}
        if match.rest:
            site.set_argument("mask", self._rest(match))
        else:
            site.clear_argument("mask")
        site.node.kwargs = {**site.node.kwargs, **built}

    def _rest(self, match: Match) -> fx.Node:
        """The remaining parts, each as small as its dependence allows, joined; shared by the sites that share them."""
        site = match.site
        needed = tuple((part, self._proof(part, site)[1]) for part in match.rest)
        if needed not in self.built:
            parts = [self._shrunk(part, depends, site.node) for part, depends in needed]
            joined = parts[0]
            for part in parts[1:]:
                joined = insert_op(site.node, _AND[0], (joined, part))
            self.built[needed] = joined
        return self.built[needed]

    def _shrunk(self, part: Part, depends: tuple[bool, ...], anchor: fx.Node) -> fx.Node:
        """The part behind its views, cut to one entry along every dimension its value does not depend on."""
        node = part.node
        for view in reversed(part.views):
            node = _view_again(view, node, anchor)
        rank = node.meta["val"].dim()
        for dim, needed in enumerate(depends[4 - rank :]):
            if not needed and not known(node.meta["val"].size(dim) == 1):
                node = insert_op(anchor, aten.slice.Tensor, (node, dim, 0, 1))
        return insert_op(anchor, _NOT[0], (node,)) if part.negated else node

    def _can_build(self, sides: list[Side], graph: fx.Graph) -> bool:
        """Whether every size in the bounds is at hand in the graph: an input, or a dimension of one."""
        if self.sizes is None:
            self.sizes = {}
            for node in graph.find_nodes(op="placeholder"):
                value = node.meta.get("val")
                for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]:
                    if isinstance(size, torch.SymInt) and (dim is None or size.node.expr not in self.sizes):
                        self.sizes[size.node.expr] = (node, dim)
        return all(bound.free_symbols <= self.sizes.keys() for _, bound in sides)

    def _size(self, side: sympy.Expr, anchor: fx.Node) -> int | fx.Node:
        """A sum or product of sizes as a node of the graph, a number as itself."""
        if side.is_Integer:
            return int(side)
        if ("size", side) in self.built:
            return self.built["size", side]
        result: int | fx.Node | None = None
        if side.is_Symbol:
            assert self.sizes is not None
            node, dim = self.sizes[side]
            result = node if dim is None else insert_op(anchor, aten.sym_size.int, (node, dim))
        else:
            for term in side.args:
                size = self._size(term, anchor)
                combine = operator.add if side.is_Add else operator.mul
                result = size if result is None else _insert_size(anchor, combine, result, size)
        assert result is not None
        self.built["size", side] = result
        return result


def match_sides(match: Match, sides: list[Side]) -> bool:
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


def _insert_size(anchor: fx.Node, combine: Callable[[Size, Size], Size], *sizes: int | fx.Node) -> fx.Node:
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(combine, sizes)
    node.meta["val"] = combine(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in sizes))
    return node


def _full_shape(site: AttentionSite) -> tuple[Size, ...]:
    query, key = site.tensor("query"), site.tensor("key")
    assert query is not None and key is not None
    return (*query.shape[:3], key.shape[2])


def _are_bool(node: fx.Node, *arguments: Any) -> bool:
    """All are bool tensors on the device of the node."""
    values = [x.meta.get("val") if isinstance(x, fx.Node) else None for x in arguments]
    device = node.meta["val"].device
    return all(isinstance(x, torch.Tensor) and x.dtype == torch.bool and x.device == device for x in values)


def _read_at(own: tuple[Size, ...], full: tuple[Size, ...], index: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, ...]:
    """The index of a tensor that is broadcast to the shape that `index` is for."""
    skipped = len(full) - len(own)
    if skipped < 0:
        raise Opaque
    for size, outer in zip(own, full[skipped:], strict=True):
        if not known(size == 1) and not known(size == outer):
            raise Opaque
    pairs = zip(own, index[skipped:], strict=True)
    return tuple(sympy.Integer(0) if known(size == 1) else x for size, x in pairs)


def _present(part: Part) -> tuple[bool, ...]:
    """Along which of the four dimensions the part, behind its views, has more than one entry."""
    shape: tuple[Size, ...] = tuple((part.views[0] if part.views else part.node).meta["val"].shape)
    return (False,) * (4 - len(shape)) + tuple(not known(size == 1) for size in shape)


def _view_again(view: fx.Node, node: fx.Node, anchor: fx.Node) -> fx.Node:
    """The view of a node that is broadcastable to what the view is of."""
    own = node.meta["val"].dim()
    inner: Any = view.args[0]
    if node is inner:
        return view
    rank = inner.meta["val"].dim()
    if view.target is aten.unsqueeze.default:
        dim = view.args[1] % (rank + 1) - (rank + 1)
        return node if -dim > own + 1 else insert_op(anchor, aten.unsqueeze.default, (node, dim))
    dim = (view.args[1] if len(view.args) > 1 else 0) % rank - rank
    if -dim > own or known(node.meta["val"].size(dim) == 1):
        return node
    return insert_op(anchor, aten.slice.Tensor, (node, dim + own, *view.args[2:]), dict(view.kwargs))
