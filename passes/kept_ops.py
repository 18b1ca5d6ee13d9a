"""Ops that stay whole while the passes look at the graph, though the inner compiler decomposes them.

A softmax is recognised as one node, not as the five of Inductor's decomposition. What no pass has taken is decomposed
at the end by the inner compiler's own table, so that it gets the graph it would have got.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.inline import trace_before
from sgl_npu.passes.npu_forms import opened_forms

aten = torch.ops.aten

KEPT = (aten._softmax.default, aten._safe_softmax.default, aten.logsumexp.default, aten.bmm.default)


def without_kept(decompositions: Mapping[Any, Callable]) -> dict[Any, Callable]:
    """The table for AOTAutograd."""
    return {**opened_forms(), **{op: rule for op, rule in decompositions.items() if op not in KEPT}}


def decompose_kept(gm: GraphModule, decompositions: Mapping[Any, Callable]) -> None:
    """Put the decomposition of every kept op that is left in its place."""
    for target in KEPT:
        if target in decompositions:
            for node in gm.graph.find_nodes(op="call_function", target=target):
                _decompose(gm, node, decompositions)


def _decompose(gm: GraphModule, node: fx.Node, decompositions: Mapping[Any, Callable]) -> None:
    inputs = node.all_input_nodes

    def run(*values: Any):
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return (node.target(*args, **kwargs),)

    (result,) = trace_before(gm, node, run, inputs, decompositions, {})
    assert result is not None
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
