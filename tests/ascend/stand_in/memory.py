"""One memory, two devices: tensors of the stand-in NPU as tensors of the CPU, and back."""

from __future__ import annotations

import ctypes
from typing import Any

import torch


def on_npu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def as_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of a tensor of the stand-in; writing to one writes to the other."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        view = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    else:
        block = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        memory = torch.frombuffer(block, dtype=torch.uint8).untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype)
        view.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
    view = view.conj() if tensor.is_conj() else view
    return view._neg_view() if tensor.is_neg() else view


def to_npu(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the stand-in with the same strides, as far as no two elements share memory."""
    tensor = tensor.resolve_conj().resolve_neg()
    copy = torch.empty_like(tensor, device="cpu")
    copy = torch.empty_strided(copy.size(), copy.stride(), dtype=copy.dtype, device=device)
    as_cpu(copy).copy_(tensor)
    return copy


def map_leaves(function: Any, value: Any) -> Any:
    """Apply to everything that is not a list or tuple; both stay what they are."""
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(map_leaves(function, item) for item in value)
    return function(value)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]
