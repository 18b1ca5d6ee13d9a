"""Ring shifts as torch's own all-to-all, for compilers that must know a collective for one.

before: sgl_npu.ring_shift(x, size, group)                              the same on every rank
after:  _c10d_functional.all_to_all_single(x, received, sent, group)    with this rank's counts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.inline import trace_before
from sgl_npu.runtime.collectives import open_shift, rank_in


def open_shifts(gm: GraphModule, decompositions: Mapping[Any, Callable]) -> None:
    """`decompositions` is the compiler's own table: an all-to-all may have a form of its own there."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.sgl_npu.ring_shift.default):
        x, size, group, *step = node.args
        opened = _opened(size, rank_in(group), group, *step)
        (result,) = trace_before(gm, node, opened, [x], decompositions, {})
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    gm.recompile()


def _opened(size: int, rank: int, group: str, step: int = 1) -> Callable[[Tensor], tuple[Tensor]]:
    return lambda x: (open_shift(x, size, rank, group, step),)
