"""sgl_npu::laser_attention: dense attention without a mask, for long sequences of 128-wide heads.

The kernel keeps its scores in float16: scaled scores beyond 65504 overflow on the hardware. The reference computes in
float32 and does not show that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_npu.runtime.npu.bnsd_call import BNSD_RULES, KERNEL_DOCS, BnsdCall, describe
from sgl_npu.runtime.npu.fia_call import INT_MAX
from sgl_npu.runtime.npu.fia_rules import dtype_name
from sgl_npu.runtime.npu.kernel_package import require
from sgl_npu.runtime.npu.rule import Rule, reject
from sgl_npu.runtime.npu.sequence_attention import attend
from sgl_npu.runtime.sizes import Size, guard

OP = "laser_attention"
SCHEMA = f"{OP}(Tensor query, Tensor key, Tensor value, float scale, SymInt kv_padding=0) -> (Tensor out, Tensor lse)"
HEAD_DIM = 128
LENGTH_MULTIPLE = 256
_KERNEL = "sgl-kernel-npu csrc/attentions/csrc/ops/laser_attention/op_kernel"


@dataclass(frozen=True, kw_only=True, eq=False)
class LaserCall(BnsdCall):
    """Arguments of laser_attention. `kv_padding` keys at the end of every sequence take no part."""

    kv_padding: Size = 0


def _half(call: LaserCall) -> str | None:
    if call.dtypes[0] != torch.float16:
        return f"query is {dtype_name(call.dtypes[0])}; the kernel reads every input as float16"
    return None


def _head_dim(call: LaserCall) -> str | None:
    return f"D = {call.dim}; the kernel takes {HEAD_DIM}" if guard(call.dim != HEAD_DIM) else None


def _lengths(call: LaserCall) -> str | None:
    for name, size in (("S", call.rows), ("Skv", call.keys)):
        if guard(size % LENGTH_MULTIPLE != 0):
            return f"{name} = {size} is not a multiple of {LENGTH_MULTIPLE}"
    return None


def _padding(call: LaserCall) -> str | None:
    if guard(call.kv_padding < 0) or guard(call.kv_padding >= LENGTH_MULTIPLE):
        return f"kv_padding = {call.kv_padding} is not in 0..{LENGTH_MULTIPLE - 1}"
    return None


LASER_RULES: tuple[Rule, ...] = (
    *BNSD_RULES,
    Rule("half", f"{_KERNEL}/laser_attention.cpp @3f03db0c", _half),
    Rule("head_dim", "sgl-kernel-npu csrc/laser_attention/op_host/laser_attention.cpp @7f12e8f0", _head_dim),
    Rule("lengths", KERNEL_DOCS, _lengths),
    # Written there as a window of pre_tokens: only the last 256 keys of a sequence can be masked out.
    Rule("padding", f"{_KERNEL}/VectorForward.h @3f03db0c", _padding),
)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_padding: int) -> None:
    reject(OP, LaserCall(**describe(query, key, value), kv_padding=kv_padding), LASER_RULES)


@torch.no_grad()
def laser_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, kv_padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """CPU kernel: out (B, N, S, D) and lse (B, N, S), both float32 as on the hardware."""
    _check(query, key, value, kv_padding)
    removed = torch.arange(key.shape[2]) >= key.shape[2] - kv_padding if kv_padding else None
    results = [attend(q, k, v, scale=scale, removed=removed) for q, k, v in zip(query, key, value, strict=True)]
    out = torch.stack([result.out for result in results])
    return out, torch.stack([(result.maximum + result.total.log()).squeeze(-1) for result in results])


def laser_attention_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, kv_padding: Size = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes, sizes possibly symbolic."""
    return query.new_empty(query.shape, dtype=torch.float32), query.new_empty(query.shape[:3], dtype=torch.float32)


def laser_attention_npu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, kv_padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """NPU kernel: sgl-kernel-npu's, which returns the lse first and calls the padding pre_tokens."""
    _check(query, key, value, kv_padding)
    lse, out = require(OP)(
        query=query.contiguous(),
        key=key.contiguous(),
        value=value.contiguous(),
        atten_mask=None,
        alibi_mask=None,
        drop_mask=None,
        scale_value=scale,
        head_num=query.shape[1],
        input_layout="BNSD",
        keep_prob=1.0,
        pre_tokens=kv_padding or INT_MAX,
        next_tokens=1,
        is_highPrecision=True,
    )
    return out, lse
