"""NPU: the update of a paged cache as npu_scatter_nd_update.

    cache (N, P, Hkv, D) → npu_scatter_nd_update at (block, row) → copy_ to cache

without a view between, which both of torch_npu's compilers turn into the op that writes in place.
npu_scatter_pa_kv_cache, made for this, takes neither negative slots nor a slot twice (torch_npu 2.13's documentation),
and so no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_npu.runtime.cache_update import write_rows
from sgl_npu.runtime.npu import ensure_ops


def ascend_update_kv_cache(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor, padded: bool = True
) -> None:
    """`sgl_npu::update_kv_cache`, in the ops that an NPU's compilers know."""
    ensure_ops()
    write_rows(key_cache, value_cache, key, value, slot_mapping, padded, torch.ops.npu.npu_scatter_nd_update.default)
