"""Sizes of torchair's GE tensors."""

from __future__ import annotations

from typing import Any


def static_size(tensor: Any, axis: int, name: str) -> int:
    """One size of an operator's input, for attributes, which are fixed when the graph is compiled.

    Raises RuntimeError if it is symbolic. torchair has no public name for sizes; `symsize` was seen in 2.13.0.
    """
    size = tensor.symsize[axis]
    if isinstance(size, int):
        return size
    raise RuntimeError(f"GE: {name} is symbolic ({size}); it must be a constant: do not mark this axis dynamic")
