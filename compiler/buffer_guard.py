"""What was proved from the values of buffers runs only while they have these values.

Every call compares each such buffer with what it was: the same object, the same memory, the same version counter. If
one is not, its values are read again: loading the same mask from a checkpoint changes nothing. Where they are other
values, the graph is compiled once more, without proofs from buffers, and that one runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from sgl_npu.passes.buffer_forms import Form, recognise
from sgl_npu.passes.buffer_inputs import BufferInput
from sgl_npu.passes.buffers import Buffers
from sgl_npu.runtime.tensor_state import TensorState

_MOST_READS = 256  # a buffer that is changed more often is not read any more


class _Check:
    """One buffer, and the states in which its values were seen to be right, or wrong, by the tensor's id.

    There may be several: layers that are compiled one by one share a graph, and each has a buffer of its own.
    """

    def __init__(self, buffer: BufferInput, form: Form) -> None:
        self.number, self.name, self.form = buffer.number, buffer.name, form
        self.right = {id(buffer.state.tensor()): buffer.state}
        self.wrong: dict[int, TensorState] = {}
        self.reads = 0

    def passes(self, tensor: torch.Tensor) -> bool:
        """Whether it is a tensor whose values were right, as it was then. Cheap: this is asked at every call."""
        state = self.right.get(id(tensor))
        return state is not None and state.is_of(tensor)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor has the form, read if it is not as it was when last seen."""
        if self.passes(tensor):
            return True
        wrong = self.wrong.get(id(tensor))
        if tensor.is_inference() or (wrong is not None and wrong.is_of(tensor)) or self.reads >= _MOST_READS:
            return False
        self.reads += 1
        with torch.no_grad():
            right = recognise(tensor) == self.form
        (self.right if right else self.wrong)[id(tensor)] = TensorState.of(tensor)
        return right


def guarded(compiled: Callable, buffers: Buffers, unproved: Callable[[], Callable]) -> Callable:
    """`compiled` behind a check of the buffers it was proved from; `unproved` makes what runs when one has changed."""
    if not buffers.used:
        return compiled
    checks = [_Check(buffers.inputs[number], buffers.forms[number]) for number in sorted(buffers.used)]
    other: Callable | None = None

    def changed(args: tuple) -> Any:
        nonlocal other
        wrong = [check.name for check in checks if not check.holds(args[check.number])]
        if not wrong:
            return compiled(*args)
        if other is None:
            warnings.warn(
                f"sgl_npu: {', '.join(wrong)} changed after the attention was compiled for its values; "
                "the graph is compiled again without them",
                stacklevel=2,
            )
            other = unproved()
        return other(*args)

    def call(*args: Any) -> Any:
        for check in checks:
            if not check.passes(args[check.number]):
                return changed(args)
        return compiled(*args)

    return call
