"""The attention operators of torch_npu, where torch_npu is and where it is not.

With torch_npu imported its own operators are used. Without it `ensure_ops` defines operators of the same
names and schemas, whose CPU kernels compute what the hardware would and reject what it would reject.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

import torch

from sgl_npu.runtime.npu import (
    attention_update,
    fused_infer,
    fusion_attention,
    npu_block_sparse_attention,
    scatter_nd_update,
)
from sgl_npu.runtime.npu.schemas import NAMESPACE, SCHEMAS

__all__ = ["FAKES", "KERNELS", "ensure_ops", "is_emulated"]

KERNELS: dict[str, Callable] = {
    fused_infer.V1: fused_infer.fused_infer_attention_score,
    fused_infer.V2: fused_infer.fused_infer_attention_score_v2,
    fusion_attention.OP: fusion_attention.fusion_attention_v3,
    attention_update.OP: attention_update.attention_update,
    npu_block_sparse_attention.OP: npu_block_sparse_attention.npu_block_sparse_attention,
    scatter_nd_update.OP: scatter_nd_update.scatter_nd_update,
}
FAKES: dict[str, Callable] = {
    fused_infer.V1: fused_infer.fused_infer_attention_score_fake,
    fused_infer.V2: fused_infer.fused_infer_attention_score_v2_fake,
    fusion_attention.OP: fusion_attention.fusion_attention_v3_fake,
    attention_update.OP: attention_update.attention_update_fake,
    npu_block_sparse_attention.OP: npu_block_sparse_attention.npu_block_sparse_attention_fake,
    scatter_nd_update.OP: scatter_nd_update.scatter_nd_update_fake,
}

_lock = threading.Lock()
# Definitions last as long as their library object.
_library: torch.library.Library | None = None


def ensure_ops() -> Literal["torch_npu", "emulated"]:
    """Make the operators exist and say whose they are. Safe to call again and from several threads.

    torch_npu must be imported before the first call: it cannot define operators that are already there.
    """
    global _library
    with _lock:
        if _library is None:
            if any(hasattr(getattr(torch.ops, NAMESPACE), name) for name in SCHEMAS):
                return "torch_npu"
            _library = _define()
        return "emulated"


def is_emulated() -> bool:
    """Whether the operators are the ones defined by `ensure_ops`."""
    return _library is not None


def _define() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, KERNELS[name], "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", FAKES[name], lib=library)
    # Without a backward torch would cut the graph here, and gradients upstream would silently be missing. The
    # other operators are for inference only, in torch_npu too.
    for module in (fusion_attention, npu_block_sparse_attention):
        torch.library.register_autograd(f"{NAMESPACE}::{module.OP}", module.no_backward, lib=library)
    return library
