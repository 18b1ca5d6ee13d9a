"""What each channel of a head is computed from: linear forms, followed back op by op and channel by channel.

    rope(x)[c]  =  + x[c] * cos[c]  - x[c + D/2] * sin[c]        terms of one channel, whatever the spelling

A tensor is walked back with a label per dimension: a sample, a row, a head, or a channel. Channels are kept apart one
by one, everything else is the same for all of them. Factors that are equal element by element have equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

SAMPLE, ROW, HEAD, CHANNEL = 0, 1, 2, -1
Label = int | None  # None: a dimension of size 1
Labels = tuple[Label, ...]

ONE = 0  # the number of the factor 1
NO_CHANNEL = -1  # the channel of a term that is a factor alone


@dataclass(frozen=True)
class Heads:
    """What channels are taken from: `node` (..., columns), where a head starts every `stride` columns.

    `labels` are given where the node has a dimension for heads, one for their channels and any order of dimensions.
    `eps`, `weight` and `bias` are those of an RMS norm over some channels of each head, `normalised` the first of these
    and their number; None where there is none.
    """

    node: fx.Node
    count: int
    stride: int
    eps: float | None = None
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    labels: Labels | None = None
    normalised: tuple[int, int] | None = None


@dataclass(frozen=True)
class Term:
    """One summand of every channel: sign * factor * column. Arrays have the tensor's rank, and size 1 but for channels.

    `sign` is 0 where a channel has no such summand.
    """

    column: np.ndarray
    sign: np.ndarray
    factor: np.ndarray

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Term:
        return Term(change(self.column), change(self.sign), change(self.factor))


@dataclass(frozen=True)
class Values:
    """A tensor as sums of terms; without `heads` it is a table: one term, and that a factor alone."""

    terms: tuple[Term, ...]
    heads: Heads | None = None

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Values:
        return Values(tuple(term.map(change) for term in self.terms), self.heads)

    @property
    def size(self) -> int:
        """How many channels there are."""
        return self.terms[0].sign.size

    @property
    def is_plain(self) -> bool:
        """Every channel is a column of the heads and nothing else."""
        return self.heads is not None and len(self.terms) == 1 and not self.terms[0].factor.any() and self._is_positive

    @property
    def range(self) -> tuple[int, int] | None:
        """The first column and the number of columns where plain channels are those, each once and in order."""
        columns = self.terms[0].column.ravel()
        first = int(columns[0]) if columns.size else 0
        in_order = self.is_plain and (columns == np.arange(first, first + columns.size)).all()
        return (first, columns.size) if in_order else None

    @property
    def _is_positive(self) -> bool:
        return bool((self.terms[0].sign == 1).all())


@dataclass(frozen=True)
class Stuck:
    """Why a tensor is no linear form of heads."""

    reason: str


def nothing(shape: Sequence[int]) -> Values:
    """Channels that have no value yet."""
    return Values((Term(*(np.full(shape, x, dtype=np.int64) for x in (NO_CHANNEL, 0, ONE))),))


def columns_of(heads: Heads, columns: np.ndarray) -> Values:
    return Values((Term(columns, np.ones_like(columns), np.full_like(columns, ONE)),), heads)


def joined(parts: Sequence[Values], join: Callable[[list[np.ndarray]], np.ndarray]) -> Values | Stuck:
    """What `join` makes of the arrays of several tensors; the heads must be the same where they have any."""
    heads = {part.heads for part in parts if part.heads is not None}
    if len(heads) > 1:
        return Stuck("it joins channels of several projections")
    count = max(len(part.terms) for part in parts)
    padded = [(*part.terms, *[_none_like(part.terms[0])] * (count - len(part.terms))) for part in parts]
    terms = (
        Term(*(join([getattr(term, name) for term in terms]) for name in ("column", "sign", "factor")))
        for terms in zip(*padded, strict=True)
    )
    return Values(tuple(terms), next(iter(heads), None))


def _none_like(term: Term) -> Term:
    return Term(np.full_like(term.column, NO_CHANNEL), np.zeros_like(term.sign), np.full_like(term.factor, ONE))


@dataclass
class Factors:
    """Numbers for factors, equal for equal values; and where in the graph a factor can be read."""

    numbers: dict[Any, int] = field(default_factory=lambda: {"one": ONE})
    places: dict[int, tuple[fx.Node, Labels, int, int]] = field(default_factory=dict)
    tables: dict[tuple[tuple[int, int], ...], tuple[fx.Node, Labels]] = field(default_factory=dict)

    def number(self, key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def table(self, key: Any, shape: Sequence[int]) -> Values:
        """A tensor of which nothing is known but that its channels are what they are."""
        return self._numbered([(key, i) for i in range(int(np.prod(shape)))], shape)

    def _numbered(self, keys: Sequence[Any], shape: Sequence[int]) -> Values:
        factor = np.array([self.number(key) for key in keys], dtype=np.int64).reshape(shape)
        return Values((Term(np.full_like(factor, NO_CHANNEL), np.ones_like(factor), factor),))

    def pointwise(self, key: Any, tables: Sequence[Values]) -> Values:
        """An op on tables, element by element."""
        signed = np.broadcast_arrays(*[x for table in tables for x in (table.terms[0].factor, table.terms[0].sign)])
        rows = zip(*(x.ravel().tolist() for x in signed), strict=True)
        return self._numbered([(key, row) for row in rows], signed[0].shape)

    def product(self, one: Values, other: Values) -> Values | Stuck:
        """A tensor times a table."""
        if one.heads is None:
            one, other = other, one
        if other.heads is not None:
            return Stuck("channels are multiplied with channels")
        (by,) = other.terms
        return Values(tuple(self._scaled(term, by) for term in one.terms), one.heads)

    def _scaled(self, term: Term, by: Term) -> Term:
        column, sign, factor, by_sign, by_factor = np.broadcast_arrays(
            term.column, term.sign, term.factor, by.sign, by.factor
        )
        if not factor.any():
            return Term(column, sign * by_sign, by_factor)
        pairs = zip(factor.ravel().tolist(), by_factor.ravel().tolist(), strict=True)
        numbers = [a or b if not (a and b) else self.number(("product", *sorted((a, b)))) for a, b in pairs]
        return Term(column, sign * by_sign, np.array(numbers, dtype=np.int64).reshape(factor.shape))

    def sum(self, one: Values, other: Values, sign: int = 1) -> Values | Stuck:
        """one + sign * other."""
        if (one.heads is None) != (other.heads is None):
            return Stuck("something that is no channel of it is added")
        if one.heads is None:
            return self.pointwise(("add", sign), [one, other])
        if one.heads != other.heads:
            return Stuck("channels of several projections are added")
        terms = [*one.terms, *(Term(term.column, sign * term.sign, term.factor) for term in other.terms)]
        shape = np.broadcast_shapes(*(term.sign.shape for term in terms))
        return Values(tuple(term.map(lambda x: np.broadcast_to(x, shape)) for term in terms), one.heads)

    def note(self, node: fx.Node, labels: Labels, table: Values) -> None:
        """Remember that the factors of a table can be read off a node."""
        (term,) = table.terms
        signed = tuple(zip(term.factor.ravel().tolist(), term.sign.ravel().tolist(), strict=True))
        self.tables.setdefault(signed, (node, labels))
        for place, (number, sign) in enumerate(signed):
            self.places.setdefault(number, (node, labels, place, sign))


def negated(values: Values) -> Values:
    return Values(tuple(Term(term.column, -term.sign, term.factor) for term in values.terms), values.heads)
