"""Sequences that a model joins from several and takes apart again, as text and image tokens in one attention.

Each of them is spread over the ranks on its own, so that joining and taking apart stay local.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from sgl_npu.passes.fx_ops import aten
from sgl_npu.runtime.sizes import Size, known


def joined_segments(graph: fx.Graph, length: Size, attention: fx.Node) -> list[Size] | None:
    """The lengths of which a `cat` makes a sequence of `length` that is cut between them after `attention`."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        shape = node.meta["val"].shape
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % max(len(shape), 1)
        parts = [part.meta["val"].shape for part in node.args[0]]
        if not known(shape[dim] == length) or any(len(part) != len(shape) for part in parts):
            continue
        segments = [part[dim] for part in parts if not known(part[dim] == 0)]
        if len(segments) > 1 and _is_cut(graph, length, segments[0], attention):
            return segments
    return None


def _is_cut(graph: fx.Graph, length: Size, first: Size, attention: fx.Node) -> bool:
    cuts = (edge for node in graph.nodes if node > attention for edge in _edges(node, length))
    return any(known(edge == first) for edge in cuts)


def _edges(node: fx.Node, length: Size) -> Iterator[Size]:
    """Where a node cuts a dimension of `length` for the first time."""
    if node.target not in (aten.slice.Tensor, aten.split_with_sizes.default):
        return
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    sliced = node.target is aten.slice.Tensor
    position = 1 if sliced else 2
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    if not known(shape[dim] == length):
        return
    for edge in node.args[2:4] if sliced else node.args[1][:1]:
        value = edge.meta["val"] if isinstance(edge, fx.Node) else edge
        if value is not None:
            yield length + value if known(value < 0) else value
