"""Masks of queries x keys that a compiled graph still makes although a band says the same: "S x S left".

What does not follow from any weight or float input is a mask, an index or a table of positions. Of these, the ones
whose last two sizes are those of a site are counted, once per storage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SquareMasks(TorchDispatchMode):
    def __init__(self, data: Iterable[Tensor], sizes: Iterable[tuple[int, int]]) -> None:
        """`data`: weights and float inputs. `sizes`: (Sq, Skv) of the sites whose mask is a band and nothing else."""
        super().__init__()
        self.found: list[str] = []
        self._sizes = set(sizes)
        self._data = {_key(x) for x in data}
        self._seen: set[int] = set()
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves([args, kwargs or {}]) if isinstance(x, Tensor)]
        from_data = any(_key(x) in self._data for x in inputs)
        known = {_key(x) for x in inputs}
        for made in (x for x in tree_leaves(out) if isinstance(x, Tensor)):
            self._alive.append(made.untyped_storage())
            if from_data:
                self._data.add(_key(made))
            elif _key(made) not in known | self._seen and self._is_mask(made):
                self._seen.add(_key(made))
                self.found.append(f"{func._schema.name} {tuple(made.shape)} {str(made.dtype).removeprefix('torch.')}")
        return out

    def _is_mask(self, tensor: Tensor) -> bool:
        if tensor.dim() < 2 or not (tensor.dtype is torch.bool or tensor.is_floating_point()):
            return False
        return tuple(tensor.shape[-2:]) in self._sizes and all(
            stride for stride, size in zip(tensor.stride()[-2:], tensor.shape[-2:], strict=True) if size > 1
        )


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
