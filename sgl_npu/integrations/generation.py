"""One graph for every length in `generate()` of transformers, without `dynamic=True`.

    model.forward = torch.compile(model.forward, backend="sgl_npu")
    mark_lengths(model)
    model.generate(**inputs)

Dynamo takes a size for fixed until it changes: a cache that grows costs a graph more, and with `dynamic=True` every
other size becomes a symbol too, which takes two to three times as long to compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["mark_lengths"]

# (batch, length) inputs, and the (batch, heads, length, size) tensors of a cache.
_INPUTS = ("input_ids", "attention_mask", "position_ids")
_CACHED = ("keys", "values")


def mark_lengths(model: nn.Module) -> RemovableHandle:
    """Let Dynamo take the lengths of the prompt and of a dynamic cache for symbols, at every call of `model`.

    `model` takes transformers' keyword arguments: `input_ids`, `attention_mask` and `position_ids` of (batch, length),
    masks of (batch, heads, queries, keys) or a dict of them, and `past_key_values`. What is compiled has to be within
    its call: its `forward`, or a part of it. The handle that is returned takes it back. A static cache, whose length
    never changes, stays as it is.
    """
    return model.register_forward_pre_hook(_mark, with_kwargs=True)


def _mark(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    for name in _INPUTS:
        given = kwargs.get(name)
        for x in given.values() if isinstance(given, dict) else (given,):
            if isinstance(x, Tensor) and x.dim() in (2, 4):
                torch._dynamo.maybe_mark_dynamic(x, 1 if x.dim() == 2 else 2)
    for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
        if not getattr(layer, "is_compileable", False):
            for name in _CACHED:
                cached = getattr(layer, name, None)
                if isinstance(cached, Tensor) and cached.dim() == 4:
                    torch._dynamo.maybe_mark_dynamic(cached, 2)
