"""Python numbers that torch.compile(dynamic=True) made inputs of the graph, and their values.

model.eps  →  input eps: f64[]  →  item  →  … + eps          a fused op takes eps as a number, not as a tensor
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_float

from sgl_npu.passes.buffer_inputs import input_number
from sgl_npu.passes.fx_ops import aten

FloatInputs = Mapping[int, torch.SymFloat]

_CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)


def float_inputs(dynamo_graph: fx.Graph) -> dict[int, torch.SymFloat]:
    """The numbers among the inputs of Dynamo's graph, by position."""
    found = {}
    for number, node in enumerate(dynamo_graph.find_nodes(op="placeholder")):
        items = [user.meta.get("example_value") for user in node.users if user.target == "item"]
        if len(items) == 1 and isinstance(items[0], torch.SymFloat):
            found[number] = items[0]
    return found


def float_value(argument: object, floats: FloatInputs) -> float | None:
    """The value of a number or of the input that holds it, with a guard that recompiles when it changes."""
    if isinstance(argument, float):
        return argument
    node = argument
    while isinstance(node, fx.Node) and node.target in _CASTS:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    number = input_number(node)
    return None if number not in floats else guard_float(floats[number])
