"""While Dynamo traces a call on NPU tensors, its result's shape is torch's own: torch_npu's would fix the length.

torch_npu answers `scaled_dot_product_attention` in C++ and reads the length as a number, also of a fake tensor, so
every length would be another graph before capture has seen the call. What runs, and what AOTAutograd traces of calls
that capture leaves alone, is torch_npu's as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_KEY = torch._C.DispatchKey.AutogradPrivateUse1  # torch_npu registers its answer there


def keep_length_symbolic() -> None:
    """Answer for fake NPU tensors. Only torch's Python dispatcher asks here, and only tracers switch it on."""
    if _KEY not in _SDPA.py_kernels:
        _SDPA.py_impl(_KEY)(_result)


def _result(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if query.device.type != "npu" or get_proxy_mode() is not None:
        return _registered(query, key, value, *args, **kwargs)
    names = ("attn_mask", "dropout_p", "is_causal")
    settings = dict(zip(names, args, strict=False)) | kwargs
    gqa = settings.pop("enable_gqa", False)
    scale = settings.pop("scale", None)
    math = torch.ops.aten._scaled_dot_product_attention_math.default
    return math(query, key, value, *(settings.get(name, x) for name, x in zip(names, (None, 0.0, False), strict=True)),
                scale=scale, enable_gqa=gqa)[0]  # fmt: skip


def _registered(*args: Any, **kwargs: Any) -> Tensor:
    """The kernel of whoever registered one. `_op_dk`, which passes this file by, is private; seen in torch 2.13."""
    return _SDPA._op_dk(_KEY, *args, **kwargs)
