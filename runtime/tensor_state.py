"""A tensor as it was once, to see later whether it is the same one and holds the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TensorState:
    """The object, its memory, and how often it had been written to. The tensor may go: `of` takes what to call then."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor, gone: Callable[[Any], object] | None = None) -> TensorState:
        return cls(weakref.ref(tensor, gone), tensor._version, tensor.data_ptr())

    def is_of(self, tensor: Any) -> bool:
        """Whether it is the same tensor, not written to since. Writes through `.data` go unnoticed, as in autograd."""
        held: Any = self.tensor()
        return tensor is held and tensor._version == self.version and tensor.data_ptr() == self.address
