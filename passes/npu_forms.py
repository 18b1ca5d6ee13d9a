"""What tracing on an NPU leaves whole, or calls by a name of its own, as the ops that tracing elsewhere gives.

npu._npu_dtype_cast(x, dtype)                aten._to_copy(x, dtype=dtype)             softmax(dtype=...) writes it
aten.repeat_interleave.self_int(x, n, dim)   unsqueeze → expand → clone → view         no converter to GE graphs has it

aten.matmul stays whole there too, and is left so: it is one kernel where bmm and its views are several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_CASTS = ("_npu_dtype_cast", "npu_dtype_cast")


def opened_forms() -> dict[Any, Callable]:
    """Decompositions of these ops; those of torch_npu's own are there once it is imported."""
    npu = torch.ops.npu
    casts = {getattr(npu, name).default: _cast for name in _CASTS if hasattr(npu, name)}
    return {**casts, aten.repeat_interleave.self_int: aten.repeat_interleave.self_int.decompose}


def _cast(x: Tensor, dtype: torch.dtype, *_: Any) -> Tensor:
    return aten._to_copy.default(x, dtype=dtype)
