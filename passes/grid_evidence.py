"""Which grid the rows of a sequence were made of, followed back from an attention to where the graph says so.

A grid is

    the output of a convolution, or an input of the graph, whose last dimensions are parts of the rows, in order; also
    where views cut the input into patches;
    a table of positions made of a range for each of three parts, or of rows and columns of one frame, that meets
    queries and keys as they are: a rotary embedding. One that is added before they are projected may be of any tokens.

Rows that are chosen one by one from different tokens are no grid, whatever one of them was made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from sgl_npu.passes.fx_ops import VIEWS, aten
from sgl_npu.passes.row_choices import row_choices
from sgl_npu.passes.token_rows import PRODUCTS, Step, is_row, is_whole, sources, whole_rows
from sgl_npu.runtime.sizes import Size, known, same_sizes

Shape = tuple[Size, Size, Size]

_DEEPEST_TABLE = 32


@dataclass(frozen=True)
class Found:
    """A grid among the rows, `before` and `after` other rows. `shape` is None where the rows mix its dimensions up.

    `positions`: a table says so, not what the rows were made of. `chosen`: no grid, but rows of different tokens.
    """

    shape: Shape | None
    node: fx.Node
    before: Size = 0
    after: Size = 0
    positions: bool = False
    chosen: bool = False

    def same(self, other: Found) -> bool:
        """Whether both say the same of the rows, for the same reason."""
        if (self.positions, self.chosen) != (other.positions, other.chosen):
            return False
        shapes = (self.shape or (), other.shape or ())
        return same_sizes(*shapes) and same_sizes((self.before, self.after), (other.before, other.after))

    def overlaps(self, other: Found, length: Size) -> bool:
        """Whether rows of a sequence may be among both."""
        first, second = self.before + other.after, self.after + other.before
        return not (known(first >= length) or known(second >= length))


@dataclass
class GridEvidence:
    """What is found of the rows of a graph's tensors. One object serves all sites of a graph that nobody changes."""

    _found: dict[Any, list[Found]] = field(default_factory=dict)
    _sources: dict[Any, list[Step]] = field(default_factory=dict)

    def grids(self, node: fx.Node, dim: int) -> list[Found]:
        """The grids that the indices of a dimension come from."""
        start = Step(node, whole_rows(node, dim))
        stack = [start]
        while stack:
            step = stack[-1]
            if step.key not in self._sources:
                self._sources[step.key] = sources(step.node, step.rows)
                stack += [source for source in self._sources[step.key] if source.key not in self._sources]
                continue
            stack.pop()
            if step.key not in self._found:
                earlier = [x for source in self._sources[step.key] for x in _around(self._found[source.key], source)]
                if step.node.target in PRODUCTS:
                    earlier = [x for x in earlier if not x.positions]
                self._found[step.key] = _different([*earlier, *_here(step), *self._chosen(step)])
        return self._found[start.key]

    def _chosen(self, step: Step) -> Iterator[Found]:
        """Rows that are chosen from several tensors, unless all were made of the same."""
        options = row_choices(step.node, self._sources[step.key])
        if len(options) < 2:
            return
        made = [[x for x in self._found[option.key] if not x.positions] for option in options]
        if all(x and _agree(x, made[0]) for x in made) or len({self._roots(option) for option in options}) == 1:
            return
        yield Found(None, step.node, chosen=True)

    def _roots(self, step: Step) -> frozenset[Any]:
        """What the rows come from in the end, as far as ops have rules."""
        pending, seen, found = [step], {step.key}, set()
        while pending:
            inner = self._sources[pending[-1].key]
            step = pending.pop()
            if not inner:
                found.add(step.key)
            fresh = [x for x in inner if x.key not in seen]
            seen.update(x.key for x in fresh)
            pending += fresh
        return frozenset(found)


def _around(found: list[Found], step: Step) -> Iterator[Found]:
    """What is found of a step's rows, as of the rows that they are taken to."""
    for x in found:
        before, after = x.before + step.before, x.after + step.after
        if known(before >= 0) and known(after >= 0):
            yield replace(x, before=before, after=after)


def _agree(one: list[Found], other: list[Found]) -> bool:
    return all(any(x.same(y) for y in other) for x in one) and all(any(x.same(y) for y in one) for x in other)


def _different(found: list[Found]) -> list[Found]:
    kept: list[Found] = []
    for x in found:
        if not any(x.same(other) for other in kept):
            kept.append(x)
    return kept


def _here(step: Step) -> Iterator[Found]:
    """What a tensor itself says of its rows."""
    node, parts = step.node, step.parts
    mixed = [atom.place for atom in parts] != sorted(atom.place for atom in parts)
    if node.target is aten.convolution.default or node.op == "placeholder":
        shape = _latent(step)
        if shape is not None or mixed or len(parts) > 3:
            yield Found(None if mixed else shape, node)
            return
    if len(parts) == len(step.rows) == 3 and not mixed and _is_table(step):
        yield Found((parts[0].size, parts[1].size, parts[2].size), node, positions=True)
    if node.target in VIEWS and is_whole(step.rows):
        yield from _picture(step)


def _latent(step: Step) -> Shape | None:
    """(T, H, W) of a (B, C, T, H, W), or of a (B, C, H, W) that may have frames in its batch.

    A dimension that is cut into patches has the part first. One part alone is no grid: any (1, 1, S, 1) has that.
    """
    shape, rows, parts = step.node.meta["val"].shape, step.rows, len(step.parts)
    if len(shape) not in (4, 5) or parts < 2 or not step.node.meta["val"].is_floating_point():
        return None
    sizes: list[Size] = []
    for dim in range(2, len(shape)):
        if dim in rows and is_row(rows[dim][0]):
            sizes.append(rows[dim][0].size)
        elif dim not in rows and known(shape[dim] == 1):
            sizes.append(1)
        else:
            return None
    frames: list[Size] = [rows[0][-1].size] if 0 in rows and is_row(rows[0][-1]) else []
    used = sum(dim in rows for dim in range(2, len(shape))) + len(frames)
    if used != parts or len(frames) + len(sizes) > 3:
        return None
    t, h, w = [1] * (3 - len(frames) - len(sizes)) + frames + sizes
    return t, h, w


def _picture(step: Step) -> Iterator[Found]:
    """(1, H, W, ...) viewed as (H * W, ...), all of whose values are computed from a range of rows or of columns."""
    (dim,) = step.rows
    for source in sources(step.node, step.rows):
        sizes = source.node.meta["val"].shape
        merged = sorted(source.rows) == [dim + 1, dim + 2] and known(sizes[dim] == 1)
        if merged and same_sizes(sizes[:dim], step.node.meta["val"].shape[:dim]) and _is_table(source):
            shape = (1, source.rows[dim + 1][0].size, source.rows[dim + 2][0].size)
            yield Found(shape, step.node, positions=True)


def _is_table(step: Step, depth: int = _DEEPEST_TABLE) -> bool:
    """Whether every value is computed from tensors that have at most one part of the rows in them."""
    if len(step.parts) < 2:
        return True
    found = sources(step.node, step.rows) if depth else []
    is_known = bool(found) or step.node.target is aten.expand.default  # which has none where it lacks all parts
    return is_known and all(_is_table(source, depth - 1) for source in found)
