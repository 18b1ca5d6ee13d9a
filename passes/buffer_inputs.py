"""Which inputs of a graph are a module's own tensors, with a value that can be read while compiling.

The private parts of torch that say so are used here only, as they are in torch 2.13: Dynamo calls a backend with the
real tensors and notes on its placeholders where they come from (`_dynamo_source`); AOTAutograd notes on its own which
input of Dynamo's graph they are (`desc`, since 2.9). Where torch says none of this, no input is a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.site import dotted
from sgl_npu.runtime.tensor_state import TensorState


@dataclass(frozen=True)
class BufferInput:
    """The input `number` of Dynamo's graph, by the name a user knows it by."""

    number: int
    name: str
    state: TensorState


def buffer_inputs(gm: GraphModule, inputs: Sequence[Any]) -> dict[int, BufferInput]:
    """The inputs of Dynamo's graph that belong to a module or are global, not trained, and not the caller's to pass."""
    if any(isinstance(value, (list, tuple, dict)) for value in inputs):
        return {}  # AOTAutograd numbers what is in them
    found = {}
    for number, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        source = getattr(node, "_dynamo_source", None)
        if type(value) is not torch.Tensor or value.is_inference() or value.requires_grad or source is None:
            continue
        if value.is_floating_point() and value.dim() < 2:
            continue  # frequencies and scales: no mask
        kind = str(getattr(source, "guard_source", ""))
        if "NN_MODULE" in kind or kind.endswith("GLOBAL"):
            name = source.name if isinstance(source.name, str) else source.name()
            found[number] = BufferInput(number, dotted(name) or name, TensorState.of(value))
    return found


def weight_inputs(gm: GraphModule, inputs: Sequence[Any]) -> frozenset[int]:
    """The inputs of Dynamo's graph that are parameters or buffers of a module, by number: ordinary tensors, with data
    or fake."""
    if any(isinstance(value, (list, tuple, dict)) for value in inputs):
        return frozenset()
    placeholders = gm.graph.find_nodes(op="placeholder")
    return frozenset(
        number
        for number, (node, value) in enumerate(zip(placeholders, inputs, strict=True))
        if type(value) in (torch.Tensor, torch.nn.Parameter, FakeTensor)
        and value.layout is torch.strided
        and not value.is_inference()
        and _is_of_a_module(node)
    )


def _is_of_a_module(placeholder: fx.Node) -> bool:
    return "NN_MODULE" in str(getattr(getattr(placeholder, "_dynamo_source", None), "guard_source", ""))


def input_number(placeholder: fx.Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of AOTAutograd's is, as it came; None for anything derived."""
    desc = placeholder.meta.get("desc")
    return desc.idx if type(desc).__name__ == "PlainAOTInput" else None
