"""Our own operators around the kernels of sgl-kernel-npu, and their definition on first use.

Each is functional, has a fake kernel, a CPU kernel that computes and rejects what the hardware does, and an NPU kernel
that calls sgl-kernel-npu. Their namespace is ours, so that importing that package clashes with nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sgl_npu.runtime.npu import (
    block_sparse_attention,
    laser_attention,
    rain_fusion_attention,
    sparse_block_estimate,
    split_qkv_rmsnorm_rope,
)

NAMESPACE = "sgl_npu"


@dataclass(frozen=True)
class PackageOp:
    """An operator: its schema and its kernels."""

    schema: str
    cpu: Callable
    fake: Callable
    npu: Callable


PACKAGE_OPS: dict[str, PackageOp] = {
    laser_attention.OP: PackageOp(
        laser_attention.SCHEMA,
        laser_attention.laser_attention,
        laser_attention.laser_attention_fake,
        laser_attention.laser_attention_npu,
    ),
    block_sparse_attention.OP: PackageOp(
        block_sparse_attention.SCHEMA,
        block_sparse_attention.block_sparse_attention,
        block_sparse_attention.block_sparse_attention_fake,
        block_sparse_attention.block_sparse_attention_npu,
    ),
    sparse_block_estimate.OP: PackageOp(
        sparse_block_estimate.SCHEMA,
        sparse_block_estimate.sparse_block_estimate,
        sparse_block_estimate.sparse_block_estimate_fake,
        sparse_block_estimate.sparse_block_estimate_npu,
    ),
    rain_fusion_attention.OP: PackageOp(
        rain_fusion_attention.SCHEMA,
        rain_fusion_attention.rain_fusion_attention,
        rain_fusion_attention.rain_fusion_attention_fake,
        rain_fusion_attention.rain_fusion_attention_npu,
    ),
    split_qkv_rmsnorm_rope.OP: PackageOp(
        split_qkv_rmsnorm_rope.SCHEMA,
        split_qkv_rmsnorm_rope.split_qkv_rmsnorm_rope,
        split_qkv_rmsnorm_rope.split_qkv_rmsnorm_rope_fake,
        split_qkv_rmsnorm_rope.split_qkv_rmsnorm_rope_npu,
    ),
}

_lock = threading.Lock()
# Definitions last as long as their library object.
_library: torch.library.Library | None = None


def ensure_package_ops() -> None:
    """Define the operators. Safe to call again and from several threads; sgl-kernel-npu need not be there."""
    global _library
    with _lock:
        if _library is None:
            _library = _define()


def _define() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, op in PACKAGE_OPS.items():
        library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, op.cpu, "CPU")
        library.impl(name, op.npu, "PrivateUse1")
        torch.library.register_fake(f"{NAMESPACE}::{name}", op.fake, lib=library)
        # Without a backward torch would cut the graph here, and gradients upstream would silently be missing.
        torch.library.register_autograd(f"{NAMESPACE}::{name}", _no_backward(name), lib=library)
    return library


def _no_backward(name: str) -> Callable:
    def backward(ctx: object, *gradients: torch.Tensor) -> None:
        raise RuntimeError(f"{NAMESPACE}::{name}: the kernel is for inference and has no backward; use attention='fa'")

    return backward
