"""What an FX graph says of its attention: ops, score-sized buffers, bytes written between projections and result."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

FUSED = ("npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2", "npu_fusion_attention_v3")
SOFTMAXES = ("_softmax", "_safe_softmax")
PRODUCTS = ("matmul", "mm", "bmm", "addmm", "linear")


def facts(graph: fx.Graph, lengths: Collection[int]) -> dict[str, Any]:
    """Counts of one graph. `lengths` are those of its sequences, unlike any other size; sizes are the example's."""
    calls = [node for node in graph.nodes if node.op == "call_function" and _is_op(node)]
    names = Counter(_name(node) for node in calls)
    return {
        "fx_ops": len(calls),
        "fused": {name: names[name] for name in FUSED if names[name]},
        "softmaxes": sum(names[name] for name in SOFTMAXES),
        "square_buffers": sum(_is_square(x, lengths) for node in calls if not _is_view(node) for x in _results(node)),
        "attention_bytes": sum(_bytes(x) for node in _attention(calls, lengths) for x in _results(node)),
    }


def _is_op(node: fx.Node) -> bool:
    return node.target is not operator.getitem and isinstance(node.target, torch._ops.OpOverload) and not _is_size(node)


def _is_size(node: fx.Node) -> bool:
    return not any(isinstance(x, torch.Tensor) for x in _leaves(node.meta.get("val")))


def _name(node: fx.Node) -> str:
    return node.target._opname


def _is_view(node: fx.Node) -> bool:
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _attention(calls: Sequence[fx.Node], lengths: Collection[int]) -> Iterator[fx.Node]:
    """The ops that write memory from the projections on to the result of an attention: masks, copies and scores."""
    found: set[fx.Node] = set()
    pending = [node for node in calls if _name(node) in FUSED or _name(node) in SOFTMAXES]
    for softmax in [node for node in pending if _name(node) in SOFTMAXES]:
        pending += _to_result(softmax, lengths)
    while pending:
        node = pending.pop()
        if node not in found and node.op == "call_function" and not _is_projection(node, lengths):
            found.add(node)
            pending += node.all_input_nodes
    return (node for node in found if node in calls and not _is_view(node))


def _to_result(softmax: fx.Node, lengths: Collection[int]) -> list[fx.Node]:
    """What reads probabilities, up to their products with values."""
    found, pending = [], [softmax]
    while pending:
        node = pending.pop()
        found.append(node)
        if any(_is_square(x, lengths) for x in _results(node)):
            pending += node.users
    return found


def _is_projection(node: fx.Node, lengths: Collection[int]) -> bool:
    """A product with a weight: no operand and no result has the size of scores."""
    if not isinstance(node.target, torch._ops.OpOverload) or _name(node) not in PRODUCTS:
        return False
    return not any(_is_square(x, lengths) for n in (node, *node.all_input_nodes) for x in _results(n))


def _is_square(x: torch.Tensor, lengths: Collection[int]) -> bool:
    """Whether a tensor has the rows and keys of scores."""
    return x.dim() >= 2 and all(_hint(size) in lengths for size in x.shape[-2:])


def _results(node: fx.Node) -> Iterator[torch.Tensor]:
    return (x for x in _leaves(node.meta.get("val")) if isinstance(x, torch.Tensor))


def _leaves(value: Any) -> Sequence[Any]:
    return torch.utils._pytree.tree_leaves(value)


def _bytes(x: torch.Tensor) -> int:
    count = 1
    for size in x.shape:
        count *= _hint(size)
    return count * x.element_size()


def _hint(size: int | torch.SymInt) -> int:
    """The size that the graph was traced with."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size
