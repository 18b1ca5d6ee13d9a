"""Which inputs of a graph are a module's own tensors, with a value that can be read while compiling.

The private parts of torch that say so are used here only, as they are in torch 2.13: Dynamo calls a backend with the
real tensors and notes on its placeholders where they come from (`_dynamo_source`); AOTAutograd notes on its own which
input of Dynamo's graph they are (`desc`, since 2.9). Where torch says none of this, no input is a buffer.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.site import dotted


@dataclass(frozen=True)
class BufferState:
    """A tensor as it was once: the object, its memory, and how often it had been written to."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> BufferState:
        return cls(weakref.ref(tensor), tensor._version, tensor.data_ptr())

    def is_of(self, tensor: Any) -> bool:
        """Whether it is the same tensor, not written to since. Writes through `.data` go unnoticed, as in autograd."""
        held: Any = self.tensor()
        return tensor is held and tensor._version == self.version and tensor.data_ptr() == self.address


@dataclass(frozen=True)
class BufferInput:
    """The input `number` of Dynamo's graph, by the name a user knows it by."""

    number: int
    name: str
    state: BufferState


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
            found[number] = BufferInput(number, dotted(name) or name, BufferState.of(value))
    return found


def input_number(placeholder: fx.Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of AOTAutograd's is, as it came; None for anything derived."""
    desc = placeholder.meta.get("desc")
    return desc.idx if type(desc).__name__ == "PlainAOTInput" else None
