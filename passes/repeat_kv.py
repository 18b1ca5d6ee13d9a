"""Take repeated key and value heads away: the canonical op groups query heads over key heads itself.

before: key = view(expand(unsqueeze(k, 2), (B, Hkv, G, S, D)), (B, Hkv * G, S, D)) → attention(query, key, value)
after:  attention(query, k, v)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sgl_npu.passes.fx_ops import VIEWS, aten, insert_op, same_shape, skip_copies, swapped_source
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.sizes import known


@dataclass(frozen=True)
class Match:
    """The heads before their repetition, and whether they are still (B, S, Hkv, D)."""

    site: AttentionSite
    key: tuple[fx.Node, bool]
    value: tuple[fx.Node, bool]


def match(site: AttentionSite) -> Match | Refusal:
    found = {}
    for name in ("key", "value"):
        node = site.argument(name)
        assert node is not None
        source = _before_repeat(node)
        if source is None:
            return Refusal(f"{name} is not repeated", node)
        found[name] = source
    key_heads, value_heads = (x.meta["val"].size(2 if swapped else 1) for x, swapped in found.values())
    if not known(key_heads == value_heads):
        return Refusal(f"key has {key_heads} heads before repetition, value {value_heads}", site.node)
    return Match(site, **found)


def rewrite(match: Match) -> None:
    for name in ("key", "value"):
        source, swapped = getattr(match, name)
        if swapped:
            source = insert_op(match.site.node, aten.transpose.int, (source, 1, 2))
        match.site.set_argument(name, source)


def _before_repeat(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The heads x before their repetition, and whether x is (B, S, Hkv, D), swapped only after it was repeated."""
    node = skip_copies(node)
    source = _repeated_along(node, 1)
    if source is not None:
        return source, False
    swapped = swapped_source(node)
    source = None if swapped is None else _repeated_along(skip_copies(swapped), 2)
    return None if source is None else (source, True)


def _repeated_along(node: fx.Node, dim: int) -> fx.Node | None:
    """The x of which every entry along `dim` stands several times in a row in `node`."""
    if node.target is aten.expand.default:
        return _one_along(node, dim)
    if node.target not in VIEWS:
        return None
    wide = skip_copies(node.args[0])
    if wide.target is not aten.expand.default or wide.meta["val"].dim() != 5:
        return None
    narrow = _one_along(wide, dim + 1)
    if narrow is None:
        return None
    sizes, merged = wide.meta["val"].shape, node.meta["val"].shape
    expected = (*sizes[:dim], sizes[dim] * sizes[dim + 1], *sizes[dim + 2 :])
    if len(merged) != 4 or not all(known(a == b) for a, b in zip(merged, expected, strict=True)):
        return None
    return _without_one(narrow, dim + 1)


def _without_one(node: fx.Node, dim: int) -> fx.Node | None:
    """The 4-D x of a node that is x with a dimension of size 1 put in at `dim`, by unsqueeze or by a view."""
    while node.target in (aten.clone.default, aten.slice.Tensor) and same_shape(node, node.args[0]):
        node = node.args[0]
    if node.target is not aten.unsqueeze.default and node.target not in VIEWS:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    sizes, wanted = source.meta["val"].shape, list(node.meta["val"].shape)
    del wanted[dim]
    same = len(sizes) == 4 and all(known(a == b) for a, b in zip(sizes, wanted, strict=True))
    return source if same and (node.target in VIEWS or node.args[1] in (dim, dim - 5)) else None


def _one_along(expand: fx.Node, dim: int) -> fx.Node | None:
    """The source of an expand that widens `dim` from 1 and nothing else."""
    source = expand.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].shape, expand.meta["val"].shape
    if len(before) != len(after) or not known(before[dim] == 1):
        return None
    same = (known(a == b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if i != dim)
    return source if all(same) else None
