"""Mask buffers are computed in the graph while masks are proved.

before: slice(buffer, ...) → ... → softmax or the mask of an attention
expose: slice(where(arange <= arange, 1, 0), ...), if the buffer's values are exactly that
keep:   slice(buffer, ...) again, wherever the computed values are still asked for

A proof that had such a value behind it holds for this value only, so `note` names the buffer: the compiled graph may
run only while the buffer is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.buffer_forms import Form, recognise
from sgl_npu.passes.buffer_inputs import BufferInput, input_number
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.inline import trace_before
from sgl_npu.passes.site import SiteRecord
from sgl_npu.runtime.attention import attention

_META_KEY = "sgl_npu_buffer"  # (name of the node that computes the buffer, number of the input)

_SOFTMAXES = (aten._softmax.default, aten._safe_softmax.default)
# Where the way back from a softmax to its mask ends, and for some the one operand it goes on to.
_ENDS: dict[Any, tuple[int, ...]] = {
    aten.bmm.default: (),
    aten.mm.default: (),
    aten.matmul.default: (),
    aten.addmm.default: (),
    attention: (),
}
_ENDS.update({softmax: () for softmax in _SOFTMAXES})
_ENDS.update({aten.baddbmm.default: (0,), aten.embedding.default: (), aten.convolution.default: ()})


@dataclass
class Buffers:
    """The buffers of one graph: all that may be read, the forms found, and those that proofs have used.

    `number_of` says which input a placeholder is. `constant`: nobody can change them, so none needs a check.
    """

    inputs: Mapping[int, BufferInput] = field(default_factory=dict)
    number_of: Callable[[fx.Node], int | None] = input_number
    constant: bool = False
    forms: dict[int, Form] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)

    def expose(self, gm: GraphModule, decompositions: Mapping[Any, Any]) -> None:
        """Compute every buffer that a mask may come from, and whose values have a form, in the graph."""
        read = dict.fromkeys(_behind(_mask_inputs(gm.graph))) if self.inputs else {}
        seen: dict[Any, fx.Node] = {}
        for placeholder in [node for node in read if node.op == "placeholder"]:
            number = self.number_of(placeholder)
            if number is not None and self._has_form(placeholder, number):
                users = [user for user in placeholder.users if user in read]
                _expose(gm, placeholder, users, number, self.forms[number], decompositions, seen)

    def _has_form(self, placeholder: fx.Node, number: int) -> bool:
        if number not in self.inputs or any(map(_writes, placeholder.users)):
            return False
        tensor, fake = self.inputs[number].state.tensor(), placeholder.meta["val"]
        if tensor is None or tensor.dtype != fake.dtype or not _same_sizes(tensor, fake):
            return False
        if number not in self.forms:
            with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.no_grad():
                form = recognise(tensor)
            if form is None:
                return False
            self.forms[number] = form
        return True

    def note(self, record: SiteRecord, *nodes: fx.Node | None) -> None:
        """A proof used the values of nodes: name the buffers they are computed from."""
        behind = _behind(node for node in nodes if node is not None)
        numbers = [number for node in behind if (number := _exposed(node)) is not None]
        self.used.update(numbers)
        names = (self.inputs[number].name for number in numbers)
        if self.constant:
            return
        record.guards = list(dict.fromkeys((*record.guards, *names)))

    def keep(self, graph: fx.Graph) -> None:
        """Read the buffers again where what they are computed by is still used."""
        placeholders = {self.number_of(node): node for node in graph.find_nodes(op="placeholder")}
        for node in list(graph.nodes):
            number = _exposed(node)
            if number is not None:
                node.replace_all_uses_with(placeholders[number])
        graph.eliminate_dead_code()


def _expose(
    gm: GraphModule,
    placeholder: fx.Node,
    users: list[fx.Node],
    number: int,
    form: Form,
    decompositions: Mapping[Any, Any],
    seen: dict[Any, fx.Node],
) -> None:
    """Compute a buffer from its form, once for all buffers that are the same, and give it to `users`."""
    anchor = next(node for node in gm.graph.nodes if node.op != "placeholder")
    value = placeholder.meta["val"]
    same = (form, tuple(value.shape), value.dtype, value.device)
    if same not in seen:
        (computed,) = trace_before(gm, anchor, lambda x: (form.build(x),), [placeholder], decompositions, {})
        assert computed is not None
        seen[same] = computed
    with gm.graph.inserting_after(seen[same]):
        node = gm.graph.call_function(aten.alias.default, (seen[same],))
    for user in users:
        user.replace_input_with(placeholder, node)
    node.meta.update({"val": value, _META_KEY: (node.name, number)})


def _exposed(node: fx.Node) -> int | None:
    """The number of the input that a node computes."""
    name, number = node.meta.get(_META_KEY, ("", None))
    return number if name == node.name else None


def _mask_inputs(graph: fx.Graph) -> list[fx.Node]:
    found = [node.args[0] for target in _SOFTMAXES for node in graph.find_nodes(op="call_function", target=target)]
    for node in graph.find_nodes(op="call_function", target=attention):
        found += [*node.args[3:5], node.kwargs.get("mask"), node.kwargs.get("bias")]
    return [node for node in found if isinstance(node, fx.Node)]


def _behind(nodes: Iterable[fx.Node]) -> Iterable[fx.Node]:
    """All nodes that a mask is computed from, itself included."""
    queue = list(nodes)
    seen = set(queue)
    while queue:
        node = queue.pop()
        yield node
        inputs = node.all_input_nodes
        if node.target in _ENDS:
            inputs = [x for x in (node.args[place] for place in _ENDS[node.target]) if isinstance(x, fx.Node)]
        queue += [x for x in inputs if x not in seen]
        seen.update(inputs)


def _writes(user: fx.Node) -> bool:
    return isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable


def _same_sizes(tensor: torch.Tensor, fake: torch.Tensor) -> bool:
    """The sizes are numbers, and the same."""
    sizes = list(fake.shape)
    return all(isinstance(size, int) for size in sizes) and sizes == list(tensor.shape)
