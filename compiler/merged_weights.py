"""Graphs whose weights were merged: compiled with the inputs that this adds, which every call computes if it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.inner import with_inputs
from sgl_npu.passes.merge_projections import joined_inputs
from sgl_npu.runtime.merged_weights import MergedWeight


def with_merged_weights(
    gm: GraphModule, inputs: Sequence[Any], compile: Callable[[GraphModule, Sequence[Any]], Callable]
) -> Callable:
    """What `compile` makes of the graph, called with the inputs that it had before weights were merged."""
    joined = joined_inputs(gm.graph)
    if not joined:
        return compile(gm, inputs)
    compiled = compile(gm, [*inputs, *(node.meta["val"] for node, _ in joined)])
    merged = [MergedWeight(join) for _, join in joined]
    return with_inputs(compiled, lambda given: [weight(given) for weight in merged])
