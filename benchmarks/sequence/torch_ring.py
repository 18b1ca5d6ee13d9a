"""torch's own context-parallel ring with the flash kernel of the CPU, which it does not come with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ROTATIONS = {"all-to-all": "ALL_TO_ALL", "all-gather": "ALL_GATHER"}


def torch_ring(rotation: str, causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of local (B, H, S, D). A causal sequence is balanced: a rank has a piece of head and one of tail."""
    ring, options, rotations = _private_ring()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options.enable_load_balance = causal  # of the process: other rings read it too
        options.rotate_method = rotations[ROTATIONS[rotation]]
        return ring(dist.group.WORLD, 2, _flash, query, key, value, is_causal=causal)[0]

    return attend


def _flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    return FLASH(query, key, value, 0.0, is_causal)


def _private_ring() -> tuple[Callable[..., Any], Any, Any]:
    """The template, its options and its ways to pass keys on; private, seen in torch 2.13."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as private

    return private._templated_ring_attention, private._cp_options, private._RotateMethod
