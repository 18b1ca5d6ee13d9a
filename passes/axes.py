"""Which dimension of a tensor becomes which, through views, permutations and copies: positions only, no values.

A tensor's dimensions are tuples of atoms. Its own start as one atom each; a view regroups them, splitting an atom where
it must; a permutation moves them; size 1 is no atom at all. Two tensors hold the same elements in the same order
exactly if their atoms, read through, are in the same order.

    x (B, S, H * D)  →  view (B, S, H, D)  →  permute (B, H, S, D)  →  clone, view (B * H, S, D)
    [(0)] [(1)] [(2)]   [0] [1] [2.0] [2.1]   [0] [2.0] [1] [2.1]       [0, 2.0] [1] [2.1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from sgl_npu.passes.fx_ops import VIEWS, aten, same_shape
from sgl_npu.runtime.sizes import Size, known

_COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
_REGROUPED = (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
_IDLE_IF_WHOLE = (aten.expand.default, aten.slice.Tensor)


@dataclass(frozen=True)
class Atom:
    """A factor of a dimension. `place` orders atoms: a part of the atom at (2,) is at (2, 0) or (2, 1)."""

    place: tuple[int, ...]
    size: Size


Axes = list[list[Atom]]


def axes_of(node: fx.Node) -> Axes:
    """The dimensions of a tensor, one atom each."""
    return axes_of_shape(node.meta["val"].shape)


def axes_of_shape(shape: Sequence[Size]) -> Axes:
    return [[] if known(size == 1) else [Atom((dim,), size)] for dim, size in enumerate(shape)]


def view_source(node: fx.Node) -> fx.Node | None:
    """The tensor whose elements this node has, each once, in another shape, order or memory; None for other ops."""
    if node.op != "call_function":
        return None
    moved = node.target in (*_COPIES, *_REGROUPED, aten.permute.default, aten.transpose.int, aten.t.default)
    if moved or (node.target in _IDLE_IF_WHOLE and _is_whole(node)):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source
    return None


def _is_whole(node: fx.Node) -> bool:
    """An expand or a slice that changes nothing but, perhaps, puts dimensions of size 1 in front."""
    source = node.args[0]
    if node.target is aten.slice.Tensor:
        return same_shape(node, source)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    missing = len(after) - len(before)
    padded = (1,) * missing + tuple(before)
    return missing >= 0 and all(known(a == b) for a, b in zip(padded, after, strict=True))


def view_chain(node: fx.Node) -> list[fx.Node]:
    """`node`, what it is a view of, what that is a view of, and so on."""
    chain = [node]
    while (source := view_source(chain[-1])) is not None:
        chain.append(source)
    return chain


def moved(axes: Axes, node: fx.Node) -> Axes | None:
    """The axes of `node` given those of its `view_source`; None where sizes do not tell."""
    if node.target in _COPIES or node.target is aten.slice.Tensor:
        return axes
    if node.target is aten.permute.default:
        return [axes[dim] for dim in node.args[1]]
    if node.target in (aten.transpose.int, aten.t.default):
        one, other = node.args[1:3] if node.target is aten.transpose.int else (0, -1)
        order = list(range(len(axes)))
        if order:
            order[one], order[other] = order[other], order[one]
        return [axes[dim] for dim in order]
    return regrouped(axes, node.meta["val"].shape)


def through(axes: Axes, chain: Sequence[fx.Node]) -> Axes | None:
    """The axes of `chain[0]` given those of `chain[-1]`."""
    found: Axes | None = axes
    for node in reversed(chain[:-1]):
        found = None if found is None else moved(found, node)
    return found


def regrouped(axes: Axes, shape: Sequence[Size]) -> Axes | None:
    """The axes of a view to `shape`; None where sizes do not tell which atoms form which dimension."""
    left = [atom for dim in axes for atom in dim]
    result: Axes = []
    for size in shape:
        dim: list[Atom] = []
        have: Size = 1
        while not known(have == size):
            if not left:
                return None
            atom = left.pop(0)
            if not _fits(have * atom.size, size):
                parts = _split(atom, have, size)
                if parts is None:
                    return None
                atom = parts[0]
                left.insert(0, parts[1])
            dim.append(atom)
            have = have * atom.size
        result.append(dim)
    return None if left else result


def rejoined(dim: Sequence[Atom]) -> list[Atom]:
    """A dimension in which the two parts of an atom stand side by side has that atom."""
    found: list[Atom] = []
    for atom in dim:
        found.append(atom)
        while len(found) > 1 and found[-2].place == (*found[-1].place[:-1], 0) and found[-1].place[-1:] == (1,):
            second, first = found.pop(), found.pop()
            if len(first.place) == 1:  # two dimensions of the tensor itself
                found += [first, second]
                break
            found.append(Atom(first.place[:-1], first.size * second.size))
    return found


def _fits(have: Size, size: Size) -> bool:
    """Whether `have` is a factor of `size`, for all that can be known."""
    if known(have == size):
        return True
    whole = size // have
    return known(whole * have == size) and not known(whole == 0)


def _split(atom: Atom, have: Size, size: Size) -> tuple[Atom, Atom] | None:
    """An atom as two, the first of which makes `have` complete."""
    need = size // have
    rest = None if known(need == 0) else atom.size // need
    if rest is None or not known(need * have == size) or not known(need * rest == atom.size):
        return None
    return Atom((*atom.place, 0), need), Atom((*atom.place, 1), rest)


def places(dims: Axes) -> list[tuple[int, ...]]:
    return [atom.place for dim in dims for atom in dim]


def in_order(dims: Axes) -> bool:
    """Whether the atoms are in the order they had at the start."""
    found = places(dims)
    return found == sorted(found)
