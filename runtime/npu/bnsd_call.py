"""A call of a fused attention whose tensors are (B, N, S, D), and the limits that those kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_npu.runtime.npu.fia_call import Shape
from sgl_npu.runtime.npu.fia_rules import FLOATS, dtype_name
from sgl_npu.runtime.npu.rule import Rule
from sgl_npu.runtime.sizes import Size, guard

KERNEL_DOCS = "sgl-kernel-npu docs/attention_kernels.md @7f12e8f0"
_HOST_CHECKS = "sgl-kernel-npu csrc/laser_attention/op_host/laser_attention.cpp @7f12e8f0"


@dataclass(frozen=True, kw_only=True, eq=False)
class BnsdCall:
    """Shapes are tuples of int or SymInt. A kernel without a value leaves it None."""

    query: Shape
    key: Shape
    value: Shape | None
    dtypes: tuple[torch.dtype, ...]

    @property
    def rows(self) -> Size:
        return self.query[2]

    @property
    def keys(self) -> Size:
        return self.key[2]

    @property
    def dim(self) -> Size:
        return self.query[3]


def describe(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None) -> dict:
    """The fields of a `BnsdCall` with these tensors."""
    given = [x for x in (query, key, value) if x is not None]
    return {
        "query": tuple(query.shape),
        "key": tuple(key.shape),
        "value": None if value is None else tuple(value.shape),
        "dtypes": tuple(x.dtype for x in given),
    }


def _ranks(call: BnsdCall) -> str | None:
    for name, shape in (("query", call.query), ("key", call.key), ("value", call.value)):
        if shape is not None and len(shape) != 4:
            return f"{name} has {len(shape)} axes; it must be (B, N, S, D)"
    return None


def _not_empty(call: BnsdCall) -> str | None:
    for name, shape in (("query", call.query), ("key", call.key)):
        if any(guard(size == 0) for size in shape):
            return f"{name} is {tuple(shape)}; no size may be 0"
    return None


def _same_dtypes(call: BnsdCall) -> str | None:
    if len(set(call.dtypes)) != 1:
        return f"the tensors are {', '.join(map(dtype_name, call.dtypes))}; they must have one dtype"
    return None


def _float_dtype(call: BnsdCall) -> str | None:
    if call.dtypes[0] not in FLOATS:
        return f"query is {dtype_name(call.dtypes[0])}; the kernel takes float16 and bfloat16"
    return None


def _value_like_key(call: BnsdCall) -> str | None:
    if call.value is not None and any(guard(a != b) for a, b in zip(call.value, call.key, strict=True)):
        return f"value is {tuple(call.value)} and key is {tuple(call.key)}; they must have one shape"
    return None


def _batch_and_dim(call: BnsdCall) -> str | None:
    for name, axis in (("B", 0), ("D", 3)):
        if guard(call.query[axis] != call.key[axis]):
            return f"{name} is {call.query[axis]} in query and {call.key[axis]} in key; they must agree"
    return None


def _groups(call: BnsdCall) -> str | None:
    if guard(call.query[1] % call.key[1] != 0):
        return f"N = {call.query[1]} is not a multiple of Nk = {call.key[1]}"
    return None


BNSD_RULES: tuple[Rule[BnsdCall], ...] = (
    Rule("ranks", _HOST_CHECKS, _ranks, gate=True),
    Rule("not_empty", KERNEL_DOCS, _not_empty, gate=True),
    Rule("same_dtypes", KERNEL_DOCS, _same_dtypes),
    Rule("float_dtype", KERNEL_DOCS, _float_dtype),
    Rule("value_like_key", KERNEL_DOCS, _value_like_key),
    Rule("batch_and_dim", KERNEL_DOCS, _batch_and_dim),
    Rule("groups", KERNEL_DOCS, _groups),
)
