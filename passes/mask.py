"""Prove what a mask tensor means: the band it says, and the smallest tensor for what is not proved.

before: attention(query, key, value, mask (B, 1, Sq, Skv)) with mask = (j <= i) & padding[b, j]
after:  attention(query, key, value, padding (B, 1, 1, Skv), upper=0)

The mask is taken apart where it is a conjunction (`mask_parts.py`), and so is a bias that is 0 or forbids
(`mask_additive.py`). Each part is read in index space (`index_space.py`). A part that is a band (`band.py`) becomes a
side of it; one that always holds goes; any other part stays a tensor, cut down to the dimensions it depends on. Proofs
hold for every size: nothing is guarded, nothing is guessed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from sgl_npu.passes.band import Band, Lengths, Side, coordinates
from sgl_npu.passes.fx_ops import aten, insert_op
from sgl_npu.passes.index_rules import RULES
from sgl_npu.passes.index_space import IndexSpace, size_expression
from sgl_npu.passes.index_values import Opaque
from sgl_npu.passes.mask_additive import Addend, addends
from sgl_npu.passes.mask_parts import AND, Part, behind_views, condition_of, conjunction, present, rebuilt, value_of
from sgl_npu.passes.mask_rows import NEVER, empty_rows
from sgl_npu.passes.mask_words import words
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.sizes import Size


@dataclass
class Match:
    """A band, the parts of the mask that stay tensors, and the terms that are left of a bias that held a mask."""

    site: AttentionSite
    band: Band
    rest: list[Part] = field(default_factory=list)
    bias: list[Part] | None = None


@dataclass(frozen=True)
class Proof:
    """What is known of a part: its condition, the sides of the band it says (None if it is none), its dependence."""

    condition: sympy.Basic
    sides: list[Side] | None
    depends: tuple[bool, ...]


class MaskProver:
    """Proofs over one graph; equal masks are proved and rebuilt once."""

    def __init__(self) -> None:
        self.space = IndexSpace(RULES)
        self.sizes: dict[sympy.Symbol, tuple[fx.Node, int | None]] | None = None
        self.lengths: dict[tuple[Any, ...], Lengths] = {}
        self.proved: dict[tuple[Part, tuple[str, ...]], Proof | None] = {}
        self.taken_apart: dict[fx.Node, list[Addend]] = {}
        self.rows: dict[tuple[Any, ...], str] = {}
        self.built: dict[tuple[Any, ...], fx.Node | int] = {}

    def match(self, site: AttentionSite) -> Match | Refusal:
        mask, shape = site.argument("mask"), _full_shape(site)
        parts, terms = self._read(site)
        moved = terms != [addend.term for addend in self._addends(site)]
        if mask is None and not moved:
            return Refusal("no mask tensor, and no bias that is one", site.node)
        match = Match(site, band_of(site), bias=terms if moved else None)
        needed = [False] * 4
        for part in parts:
            proof = self._proof(part, shape)
            if proof is None:
                return Refusal(
                    "a part of the mask is broadcast or sliced by sizes that are not known to match", part.node
                )
            sides = proof.sides
            if sides is None or not self._can_build(sides, site.node.graph) or not match.band.take(sides):
                match.rest.append(part)
                needed = [one or other for one, other in zip(needed, proof.depends, strict=True)]
        if not moved and mask is not None and match.rest == parts and needed == list(present(Part(mask))):
            return Refusal("no part of the mask is a band, and it depends on every dimension it has", mask)
        return match

    def empty_rows(
        self,
        parts: Sequence[Part],
        shape: Sequence[Size],
        band: Band | None = None,
        unknown: bool = False,
    ) -> str:
        """Whether a row of scores of this shape (..., Sq, Skv) may be left without a key: never, possible or some.

        A row keeps what all parts and the band keep, and nothing more; `unknown`: perhaps less.
        """
        shape = tuple(shape)
        parts = [simple for part in parts for simple in conjunction(part, self.space)]
        band = Band() if band is None else replace(band)
        key = (tuple(parts), _names(shape), band.lower, band.upper, unknown)
        if key not in self.rows:
            conditions: list[sympy.Basic | None] = [None] if unknown else []
            for proof in (self._proof(part, shape) for part in parts):
                if proof is None or proof.sides is None or not band.take(proof.sides):
                    conditions.append(None if proof is None else proof.condition)
            self.rows[key] = empty_rows(conditions, band, self._lengths(parts, shape))
        return self.rows[key]

    def describe(self, site: AttentionSite, found: Match | Refusal) -> None:
        """Note what `match` has found: the name of what is left of the mask, and whether rows may be empty."""
        shape = _full_shape(site)
        parts, terms = self._read(site)
        site.record.empty_rows = self.empty_rows(parts, shape, band_of(site), unknown=bool(terms))
        site.record.tensor_mask = words(self._conditions(found.rest if isinstance(found, Match) else parts, shape))

    def kept_conditions(self, site: AttentionSite, found: Match | Refusal) -> list[sympy.Basic | None]:
        """What the parts of the mask say that are no band: a condition each, None where nothing is known of it."""
        parts = found.rest if isinstance(found, Match) else self._read(site)[0]
        return self._conditions(parts, _full_shape(site))

    def _conditions(self, parts: Sequence[Part], shape: tuple[Size, ...]) -> list[sympy.Basic | None]:
        proofs = [self._proof(part, shape) for part in parts]
        return [None if proof is None else proof.condition for proof in proofs]

    def _read(self, site: AttentionSite) -> tuple[list[Part], list[Part]]:
        """The parts whose conjunction mask and bias are, and the terms of the bias that are none of it."""
        mask, found = site.argument("mask"), self._addends(site)
        own = [] if mask is None else list(conjunction(Part(mask), self.space))
        if any(addend.finite for addend in found):
            everything = [*own, *(part for addend in found for part in addend.parts)]
            unknown = any(addend.rest is not None for addend in found)
            if self.empty_rows(everything, _full_shape(site), band_of(site), unknown=unknown) != NEVER:
                found = [x.kept_whole() if x.finite else x for x in found]
        moved = (simple for x in found for part in x.parts for simple in conjunction(part, self.space))
        return list(dict.fromkeys([*own, *moved])), [x.rest for x in found if x.rest is not None]

    def _addends(self, site: AttentionSite) -> list[Addend]:
        bias = site.argument("bias")
        if bias is None:
            return []
        if bias not in self.taken_apart:
            self.taken_apart[bias] = addends(Part(bias, additive=True), self.space)
        return self.taken_apart[bias]

    def _proof(self, part: Part, shape: tuple[Size, ...]) -> Proof | None:
        """None where the sizes of the part are not known to match."""
        key = (part, _names(shape))
        if key not in self.proved:
            try:
                self.proved[key] = self._prove(part, shape)
            except Opaque:
                self.proved[key] = None
        return self.proved[key]

    def _prove(self, part: Part, shape: tuple[Size, ...]) -> Proof:
        value = value_of(part, shape, self.space)
        condition = condition_of(part, shape, self.space)
        symbols = zip(coordinates(len(shape)), present(part, len(shape)), strict=True)
        depends = tuple(x in value.free_symbols and there for x, there in symbols)
        return Proof(condition, self._lengths([part], shape).band(condition), depends)

    def site_lengths(self, site: AttentionSite) -> Lengths:
        return self._lengths([], _full_shape(site))

    def _lengths(self, parts: Sequence[Part], shape: tuple[Size, ...]) -> Lengths:
        rows, keys = shape[-2:]
        values = [*(part.node.meta["val"] for part in parts), *shape]
        shape_env = next((env for value in values if (env := _shape_env(value)) is not None), None)
        key = (*_names((rows, keys)), shape_env is None)
        if key not in self.lengths:
            self.lengths[key] = Lengths(rows, keys, shape_env)
        return self.lengths[key]

    def rewrite(self, match: Match) -> None:
        site = match.site
        given = band_of(site).sides()
        changed = {name: side for name, side in match.band.sides().items() if given.get(name) != side}
        built = {name: self._size(side, site.node) for name, side in changed.items()}
        if match.rest:
            site.set_argument("mask", self._rest(match))
        elif site.argument("mask") is not None:
            site.clear_argument("mask")
        if match.bias is not None:
            self._set_bias(site, match.bias)
        site.node.kwargs = {**site.node.kwargs, **built}

    def _rest(self, match: Match) -> fx.Node:
        """The remaining parts, each as small as its dependence allows, joined; shared by the sites that share them."""
        site, shape = match.site, _full_shape(match.site)
        needed = tuple((part, proof.depends) for part in match.rest if (proof := self._proof(part, shape)))
        if needed not in self.built:
            self.built[needed] = self._joined(site.node, AND[0], [rebuilt(*x, site.node) for x in needed])
        return self.built[needed]

    def _set_bias(self, site: AttentionSite, terms: list[Part]) -> None:
        if not terms:
            site.clear_argument("bias")
            return
        key = ("bias", *terms)
        if key not in self.built:
            self.built[key] = self._joined(
                site.node, aten.add.Tensor, [behind_views(term, site.node) for term in terms]
            )
        site.set_argument("bias", self.built[key])

    @staticmethod
    def _joined(anchor: fx.Node, join: Any, parts: Sequence[fx.Node]) -> fx.Node:
        joined = parts[0]
        for part in parts[1:]:
            joined = insert_op(anchor, join, (joined, part))
        return joined

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


def _insert_size(anchor: fx.Node, combine: Callable[[Size, Size], Size], *sizes: int | fx.Node) -> fx.Node:
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(combine, sizes)
    node.meta["val"] = combine(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in sizes))
    return node


def _full_shape(site: AttentionSite) -> tuple[Size, ...]:
    query, key = site.tensor("query"), site.tensor("key")
    assert query is not None and key is not None
    return (*query.shape[:3], key.shape[2])


def band_of(site: AttentionSite) -> Band:
    """The band that a site has already."""
    return Band(*(None if side is None else size_expression(side) for side in (site.lower, site.upper)))


def _shape_env(value: Any) -> Any:
    """What knows the symbols of a size, or of the sizes of a fake tensor."""
    if isinstance(value, torch.SymInt):
        return value.node.shape_env
    mode = getattr(value, "fake_mode", None)
    return None if mode is None else mode.shape_env


def _names(sizes: Sequence[Size]) -> tuple[str, ...]:
    return tuple(map(str, sizes))
