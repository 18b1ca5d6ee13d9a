"""Lengths for graph capture: what a fused op gets in a list of lengths becomes an input of the graph.

before: forward(q, s0): n = s0 * 2; fused_infer_attention_score_v2(…, actual_seq_qlen=[s0, n])
after:  forward(q, s0, length): fused_infer_attention_score_v2(…, actual_seq_qlen=[s0, length])      length = s0 * 2

A captured graph is replayed with new lengths by updating the arguments of such ops, and what captures it (npugraph_ex
of torch_npu 2.13: "only sym and constant is supported") updates them from inputs alone, never from arithmetic inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.graph_sizes import sizes_function
from sgl_npu.runtime.length_at import length_at
from sgl_npu.runtime.npu.schemas import LENGTH_LISTS, NAMESPACE
from sgl_npu.runtime.sizes import expression


def hoist_lengths(gm: GraphModule) -> Callable[..., Sequence[int]] | None:
    """Make every computed length a new input behind the others; None if there is none.

    Returns the function from the old inputs to the values of the new ones, in their order. A length that is no
    arithmetic of the inputs' sizes stays where it is.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    expressions = {node: expression(node.meta.get("val")) for node in _listed(gm.graph) if node.op != "placeholder"}
    expressions = {node: x for node, x in expressions.items() if x is not None and sizes_function(inputs, [x])}
    compute = sizes_function(inputs, list(dict.fromkeys(expressions.values())))
    if not expressions or compute is None:
        return None
    new: dict[Any, fx.Node] = {}
    for node, formula in expressions.items():
        if formula not in new:
            with gm.graph.inserting_after([*inputs, *new.values()][-1]):
                new[formula] = gm.graph.placeholder(f"length_{len(new)}")
            new[formula].meta["val"] = node.meta["val"]
    for user, name in _lists(gm.graph):
        given = [new[expressions[x]] if x in expressions else x for x in user.kwargs[name]]
        user.update_kwarg(name, given)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return compute


def hoist_reads(gm: GraphModule) -> Callable[..., Sequence[int]] | None:
    """Make every entry that the graph reads from an input of lengths a new input behind the others; None if none is.

    Returns the function from the old inputs to the values of the new ones: each such input is read once, as a whole.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    reads: dict[tuple[int, int], fx.Node] = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=length_at)):
        source, index = node.args
        if source not in inputs:
            continue
        key = inputs.index(source), index
        if key not in reads:
            with gm.graph.inserting_after([*inputs, *reads.values()][-1]):
                reads[key] = gm.graph.placeholder(f"read_{len(reads)}")
            reads[key].meta["val"] = node.meta["val"]
        node.replace_all_uses_with(reads[key])
        gm.graph.erase_node(node)
    if not reads:
        return None
    gm.recompile()
    places = list(reads)

    def compute(*args: Any) -> list[int]:
        values = {number: args[number].tolist() for number in {number for number, _ in places}}
        return [values[number][index] for number, index in places]

    return compute


def _lists(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """Every argument of an op that is a list of lengths: the op's node and the argument's name."""
    names = {f"{NAMESPACE}::{op}": arguments for op, arguments in LENGTH_LISTS.items()}
    found = []
    for node in graph.nodes:
        target = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        found += [(node, name) for name in names.get(target, ()) if node.kwargs.get(name)]
    return found


def _listed(graph: fx.Graph) -> list[fx.Node]:
    lengths = [x for node, name in _lists(graph) for x in node.kwargs[name]]
    return [x for x in dict.fromkeys(lengths) if isinstance(x, fx.Node)]
