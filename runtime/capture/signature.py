"""What decides which graph a call needs: everything about its inputs but the values that a replay brings in.

A tensor counts with its shape, dtype, device, order in memory and whether it wants a gradient; a Python value with its
type and value; a container with its type and names. The values of a host list count unless the driver updates them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sgl_npu.runtime.capture.buckets import Refusal
from sgl_npu.runtime.capture.structure import children, is_host_list, list_name

REQUIRES_GRAD = "an input requires grad"
_STRIDED = torch.strided
_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN = {int, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


class Lengths(tuple):
    """A host list in a key: its values, or, where replays update it, its length alone."""


class Unkeyed(Exception):
    """An input that no graph can stand for."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


def read(
    inputs: Mapping[str, Any],
    updated: Collection[str],
    state: Any,
    grad: bool,
    tensors: list[Tensor],
    lists: list[list[int]],
) -> tuple[Any, ...]:
    """The key of a call; fills in its tensors and the host lists that are updated, in the order of their leaves.

    updated: names of those lists. state: what else the key holds. Inputs count in the order of their names, however the
    caller ordered them. Raises Unkeyed.
    """
    key: list[Any] = [state]
    for name in sorted(inputs):
        value = inputs[name]
        key.append(name)
        if (
            type(value) is Tensor
            and value.layout is _STRIDED
            and value.is_contiguous()
            and not (grad and value.requires_grad)
        ):  # what most inputs are, without the detour
            tensors.append(value)
            key += (value.shape, value.dtype, value.device, None)
        else:
            _add(name, value, key, updated, grad, tensors, lists)
    return tuple(key)


def _add(
    path: str,
    value: Any,
    key: list[Any],
    updated: Collection[str],
    grad: bool,
    tensors: list[Tensor],
    lists: list[list[int]],
) -> None:
    kind = type(value)
    if isinstance(value, Tensor):
        if grad and value.requires_grad:
            reason = f"{path} requires grad, and a replay has no backward: call the runner in torch.no_grad()"
            raise Unkeyed(Refusal(REQUIRES_GRAD, reason))
        if kind not in _TENSORS or value.layout is not _STRIDED:
            what = kind.__name__ if kind not in _TENSORS else f"tensor of layout {value.layout}"
            reason = f"{path} is a {what}: only plain strided tensors are copied"
            raise Unkeyed(Refusal("an input is no plain tensor", reason))
        tensors.append(value)
        key += (value.shape, value.dtype, value.device, memory_order(value))
    elif kind in _PLAIN:
        key += (kind, value)
    elif kind is float:
        key += (kind, repr(value))  # nan is not equal to itself, and 0.0 is to -0.0
    elif kind is torch.Size or isinstance(value, Enum):
        key += (kind, tuple(value) if kind is torch.Size else value)
    elif is_host_list(value):
        if list_name(path) in updated:
            lists.append(value)
            key += (kind, Lengths((len(value),)))
        else:
            key += (kind, Lengths(value))
    else:
        for inner, child in _opened(path, value, key):
            _add(f"{path}.{inner}", child, key, updated, grad, tensors, lists)


def _opened(path: str, value: Any, key: list[Any]) -> Iterable[tuple[str, Any]]:
    """What a container holds, its structure added to the key."""
    kind = type(value)
    if kind is list or kind is tuple:
        key += (kind, len(value))
        return ((str(index), child) for index, child in enumerate(value))
    if kind is dict:
        key += (kind, tuple(value))
        return ((str(name), child) for name, child in value.items())
    found, spec = children(value)
    if len(found) == 1 and found[0][1] is value:
        reason = (
            f"{path} is a {kind.__name__}, which nothing is known about: pass its tensors, or register its class with "
            "torch.utils._pytree.register_pytree_node"
        )
        raise Unkeyed(Refusal("an input of unknown kind", reason))
    try:
        hash(spec)
    except TypeError:
        reason = f"{path} is a {kind.__name__} whose context has no hash: pass its tensors"
        raise Unkeyed(Refusal("an input of unknown kind", reason)) from None
    key += (spec, tuple(name for name, _ in found))
    return found


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions from the outermost in memory to the innermost; None where that is the order they have anyway.

    Gaps do not matter, for a copy has none. Dimensions of size 1, or expanded ones, stand where they do in the shape.
    """
    if tensor.is_contiguous():
        return None
    strides, inner = list(tensor.stride()), 1
    for axis in reversed(range(tensor.dim())):
        if tensor.shape[axis] == 1 or strides[axis] == 0:
            strides[axis] = inner
        inner = strides[axis] * max(tensor.shape[axis], 1)
    order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
    return None if order == tuple(range(tensor.dim())) else order


def graph_key(key: tuple[Any, ...], shapes: Iterator[torch.Size], lists: Iterator[Lengths]) -> tuple[Any, ...]:
    """The key of a call, with its tensors and host lists as large as in the graph: given in their order."""
    found: list[Any] = []
    for item in key:
        if type(item) is torch.Size:
            found.append(next(shapes))
        elif type(item) is Lengths:
            found.append(next(lists))
        else:
            found.append(item)
    return tuple(found)
