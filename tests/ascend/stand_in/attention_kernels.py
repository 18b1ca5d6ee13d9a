"""Fused attention: sgl_npu's emulation as the kernels of torch_npu's own operators.

npugraph_ex rewrites fused infer attention into a question for the workspace and a call with outputs, so these
have kernels too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sgl_npu.runtime.npu import KERNELS as EMULATED
from sgl_npu.runtime.npu import scatter_nd_update
from sgl_npu.runtime.npu.fused_infer import V1, V2


def _workspace(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return query.new_empty(0, dtype=torch.uint8)


def _scatter_nd_update_in_place(input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    return input.copy_(EMULATED[scatter_nd_update.OP](input, indices, updates))


def _with_outputs(name: str) -> Callable[..., Any]:
    """The schema does not mark `out` as written, so this runs on the device and writes it there."""

    def run(*args: Any, out: list[torch.Tensor], workspace: torch.Tensor | None = None, **kwargs: Any) -> tuple:
        results = getattr(torch.ops.npu, name)(*args, **kwargs)
        for target, result in zip(out, results, strict=True):
            # The log-sum-exp that was not asked for is empty, whatever room there is for it.
            if result.numel():
                if (target.shape, target.dtype) != (result.shape, result.dtype):
                    raise RuntimeError(
                        f"{name}: out is {target.dtype} {tuple(target.shape)}, "
                        f"the result {result.dtype} {tuple(result.shape)}"
                    )
                target.copy_(result)
        return tuple(out)

    return run


KERNELS: dict[str, Callable[..., Any]] = {f"npu::{name}": kernel for name, kernel in EMULATED.items()} | {
    f"npu::_{name}_get_max_workspace": _workspace for name in (V1, V2)
}
KERNELS[f"npu::{scatter_nd_update.OP}_"] = _scatter_nd_update_in_place
OUT_KERNELS: dict[str, Callable[..., Any]] = {f"npu::{name}.out": _with_outputs(name) for name in (V1, V2)}
