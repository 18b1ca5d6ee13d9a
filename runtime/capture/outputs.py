"""What a replay leaves behind, cut back to the size of the call and handed out.

The next replay writes over a graph's outputs, and with a pool that graphs share any replay may: so a copy is handed
out, unless the caller consumes at once and asked for views.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from sgl_npu.runtime.capture.buckets import Bucket, Declared, absent, cut
from sgl_npu.runtime.capture.captured_graph import NotCapturable
from sgl_npu.runtime.capture.structure import flatten

_PLAIN = (str, type(None), torch.dtype, torch.device)


class Outputs:
    """The outputs of a captured graph. Raises NotCapturable for what no replay can bring up to date."""

    def __init__(self, captured: Any, dims: Declared, bucket: Bucket) -> None:
        self._leaves, unflatten = flatten(captured)
        _check_paths(dims, [path for path, leaf in self._leaves if isinstance(leaf, Tensor)])
        self._dims = [dims.of(path) for path, _ in self._leaves]
        for (path, leaf), names in zip(self._leaves, self._dims, strict=True):
            _check(path or "the output", leaf, names, bucket)
        self._build = _builder(captured) or unflatten

    def handed_out(self, size: Bucket, copy: bool) -> Callable[[], Any]:
        """What gives the outputs of a call of that size, after each replay."""
        values = [
            cut(leaf, names, size) if isinstance(leaf, Tensor) else leaf
            for (_, leaf), names in zip(self._leaves, self._dims, strict=True)
        ]
        build = self._build
        if not copy:
            return lambda: build(values)
        return lambda: build([value.clone() if isinstance(value, Tensor) else value for value in values])


def _check_paths(dims: Declared, tensors: list[str]) -> None:
    """An entry may be of what only some calls return, but not while a tensor has none: it would not be cut back."""
    unused = absent(dims.entries, tensors)
    bare = [path for path in tensors if dims.entry(path) is None]
    if unused and bare:
        raise NotCapturable(
            f"output_dims has an entry for {unused[0]!r}, which is not among the outputs, and none for {bare[0]!r}: "
            f"rename it, or add {bare[0]!r}: () if none of its dimensions is a bucket's"
        )


def _check(path: str, leaf: Any, names: tuple[str | None, ...], bucket: Bucket) -> None:
    if not isinstance(leaf, (Tensor, *_PLAIN)):
        raise NotCapturable(
            f"{path} is of type {type(leaf).__name__}, which a replay cannot bring up to date: return tensors; a "
            "class that holds them is opened once it is registered with torch.utils._pytree.register_pytree_node"
        )
    if not isinstance(leaf, Tensor):
        return
    shape = tuple(leaf.shape)
    for axis, name in enumerate(names):
        if name is not None and (axis >= len(shape) or shape[axis] != getattr(bucket, name)):
            raise NotCapturable(
                f"{path} has shape {shape}, but output_dims calls its dimension {axis} {name!r}, which is "
                f"{getattr(bucket, name)} in this bucket: give output_dims by path, such as {{'logits': ('batch', "
                "'tokens'), 'aux_loss': ()}"
            )


def _builder(captured: Any) -> Callable[[list[Any]], Any] | None:
    """A short cut for a tensor and for a flat tuple or list; None for other structures."""
    if isinstance(captured, Tensor):
        return itemgetter(0)
    if type(captured) is tuple and all(isinstance(value, (Tensor, *_PLAIN)) for value in captured):
        return tuple
    return None
