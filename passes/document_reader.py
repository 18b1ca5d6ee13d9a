"""The ends of documents as inputs of a graph, and what reads them from its other inputs before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.document_masks import Documents, Leaf
from sgl_npu.passes.fx_ops import is_repeatable
from sgl_npu.passes.merge_projections import other_inputs
from sgl_npu.runtime.document_ends import document_ends

MOST_DOCUMENTS = 64
_MOST_OPS = 64  # through so many the ids are computed a second time

Reader = Callable[[Sequence[Any]], "list[int] | None"]
Source = tuple[Leaf, "Leaf | None"]


def source_of(documents: Documents) -> Source:
    """What the ends are read from."""
    return documents.ids, documents.positions


def is_readable(source: Source) -> bool:
    """Whether ids and positions are known before the graph runs: a few ops on the integers that it is given."""
    return all(leaf is None or _ancestors(leaf.node) is not None for leaf in source)


def _ancestors(node: fx.Node) -> set[fx.Node] | None:
    """What a node is computed from, itself included; None where that is more than a few ops on integers."""
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        node = queue.pop()
        if node in found:
            continue
        value = node.meta.get("val")
        is_size = isinstance(value, (int, torch.SymInt))
        is_integer = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
        repeatable = node.op in ("placeholder", "get_attr") or is_size or is_repeatable(node.target)
        if not (is_size or is_integer) or not repeatable or len(found) >= _MOST_OPS:
            return None
        found.add(node)
        queue += node.all_input_nodes
    return found


def reader(gm: GraphModule, sources: Sequence[Source]) -> Reader:
    """The function from the inputs that calls give to the ends in every source, but the last one of each.

    It gives None where the documents of a source are not as `document_ends` wants them.
    """
    leaves = list(dict.fromkeys(leaf for source in sources for leaf in source if leaf is not None))
    needed = set(other_inputs(gm.graph)).union(*(_ancestors(leaf.node) or () for leaf in leaves))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[leaf.node] for leaf in leaves])
    compute = fx.GraphModule(gm, graph)

    @torch.no_grad()
    def read(args: Sequence[Any]) -> list[int] | None:
        tensors = {leaf: leaf.tokens(x) for leaf, x in zip(leaves, compute(*args), strict=True)}
        found = []
        for ids, positions in sources:
            ends = document_ends(tensors[ids], None if positions is None else tensors[positions], MOST_DOCUMENTS)
            if ends is None:
                return None
            found += ends[:-1]
        return found

    return read


def add_ends(graph: fx.Graph, source: Source) -> list[fx.Node]:
    """Inputs behind those that calls give for what the reader gives for a source: numbers not known at compile time."""
    mode = detect_fake_mode(source[0].node.meta["val"])
    assert mode is not None and mode.shape_env is not None
    inputs = other_inputs(graph)
    nodes: list[fx.Node] = []
    for number in range(len(inputs), len(inputs) + MOST_DOCUMENTS - 1):
        with graph.inserting_after([*inputs, *nodes][-1]), mode.shape_env.ignore_fresh_unbacked_symbols():
            nodes.append(graph.placeholder(f"document_end_{number}"))
            nodes[-1].meta["val"] = mode.shape_env.create_unbacked_symint()
    return nodes
