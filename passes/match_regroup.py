"""Terms that are added to scores whose rows and keys are in pieces, as the places of a picture are (ViTDet, MViT).

before:  view(add(view(scores, (B, h, w, k, l)), term), (B, h * w, k * l))
after:   view(view(add(scores, reshape(expand(term, (B, h, w, k, l)), (B, h * w, k * l))), …), …)

Casts and factors in between move along; each score is computed as before. The views that are left cancel, and the
match reads the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.axes import axes_of, in_order, through, view_chain, view_source
from sgl_npu.passes.constants import is_float_cast
from sgl_npu.passes.fx_ops import DIVISIONS, MULTIPLICATIONS, aten, same_shape
from sgl_npu.passes.graph_sizes import share_sizes
from sgl_npu.passes.inline import trace_before
from sgl_npu.passes.match_idle import keeps_rows_and_keys
from sgl_npu.passes.match_scores import PRODUCTS

_STEPS = (aten.add.Tensor, aten.sub.Tensor, *MULTIPLICATIONS, *DIVISIONS)


def whole_rows_and_keys(
    scores: fx.Node, gm: GraphModule, decompositions: Mapping[Any, Any], seen: dict[Any, Any]
) -> bool:
    """Compute what is done to pieces of the scores before they are cut; whether there is anything."""
    found = False
    for node, place in reversed(_path(scores) or []):
        whole = _uncut(node.args[place])
        others = [x for x in _without(node, place) if isinstance(x, fx.Node)]
        if whole is None or not all(map(_is_tensor, others)) or not _is_plain(node):
            continue

        def run(x: Tensor, *rest: Tensor, node: fx.Node = node, place: int = place) -> tuple[Tensor]:
            shape, terms = node.meta["val"].shape, iter(rest)
            # A tensor of no dimension counts less where dtypes differ, so it stays as it is.
            args = [_like(x, next(terms), shape) if isinstance(arg, fx.Node) else arg for arg in _without(node, place)]
            args.insert(place, x)
            return (node.target(*args, **node.kwargs).view(shape),)

        (moved,) = trace_before(gm, node, run, [whole, *others], decompositions, seen)
        assert moved is not None
        node.replace_all_uses_with(moved)
        found = True
    if found:  # what is left of the views, and sizes read off the scores, would be a second use of them
        share_sizes(gm.graph)
        gm.graph.eliminate_dead_code()
    return found


def _without(node: fx.Node, place: int) -> list[Any]:
    return [x for position, x in enumerate(node.args) if position != place]


def _like(x: Tensor, term: Tensor, shape: Any) -> Tensor:
    return term.expand(shape).reshape(x.shape) if term.dim() else term


def _path(node: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """Casts and arithmetic from a node in to the product, outermost first, and which operand has the scores.

    None where it leads to no product, or to several.
    """
    if node.target in PRODUCTS:
        return []
    is_step = is_float_cast(node) or node.target in _STEPS
    places = [0]
    if node.target in _STEPS:
        places = [place for place, x in enumerate(node.args[:2]) if _is_tensor(x) and same_shape(node, x)]
    elif not is_step and view_source(node) is None:
        return None
    inner = {place: _path(node.args[place]) for place in places if len(node.args[place].users) == 1}
    found = [(place, path) for place, path in inner.items() if path is not None]
    if len(found) != 1:
        return None
    place, path = found[0]
    return [(node, place), *path] if is_step else path


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)


def _is_plain(node: fx.Node) -> bool:
    """Whether its options are numbers and dtypes, which mean the same whatever the shape."""
    return node.kwargs.get("memory_format") is None and not any(isinstance(x, fx.Node) for x in node.kwargs.values())


def _uncut(node: fx.Node) -> fx.Node | None:
    """The tensor whose rows or keys `node` is in pieces; None where it is anything else than a regrouping of it."""
    chain = view_chain(node)
    whole, axes = chain[-1], axes_of(chain[-1])
    after = through(axes, chain)
    if after is None or not in_order(after) or keeps_rows_and_keys(axes, after) or len(axes) < 2:
        return None
    return whole
