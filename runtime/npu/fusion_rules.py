"""Limits of npu_fusion_attention_v3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from sgl_npu.runtime.npu.fia_call import INT_MAX, Shape, is_given
from sgl_npu.runtime.npu.fia_mask_rules import COMPRESSED_MODES, DENSE_MODES, compressed_mask_sentence
from sgl_npu.runtime.npu.fia_rules import dtype_name, shapes_differ
from sgl_npu.runtime.npu.layouts import AxisSizes, read_sizes
from sgl_npu.runtime.npu.rule import Rule
from sgl_npu.runtime.npu.sources import DOCS_FUSION, EMULATION
from sgl_npu.runtime.sizes import guard

FUSION_LAYOUTS = ("BSH", "SBH", "BSND", "BNSD")
UNCOVERED_LAYOUTS = ("TND",)
UNCOVERED_MODES = (5, 6, 7, 8)
FUSION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FUSION_MASK_DTYPES = (torch.bool, torch.uint8)
MAX_HEADS = 256
MAX_DIM = 768
MAX_LENGTH = 1_048_576


@dataclass(frozen=True, kw_only=True, eq=False)
class FusionAttentionCall:
    """Arguments of npu_fusion_attention_v3. Shapes are tuples of int or SymInt.

    `other_inputs` names every further argument that was given a non-default value. The properties presuppose
    the gate rules: a covered layout and fitting ranks.
    """

    layout: str
    query: Shape
    key: Shape
    value: Shape
    query_dtype: torch.dtype
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    head_num: int
    pse: Shape | None = None
    pse_dtype: torch.dtype | None = None
    atten_mask: Shape | None = None
    atten_mask_dtype: torch.dtype = torch.bool
    sparse_mode: int = 0
    pre_tokens: int = INT_MAX
    next_tokens: int = INT_MAX
    keep_prob: float = 1.0
    other_inputs: frozenset[str] = frozenset()

    @cached_property
    def q(self) -> AxisSizes:
        return read_sizes(self.layout, self.query, self.head_num)

    @cached_property
    def kv_heads(self) -> int:
        """Heads of key: there is no argument for it, so the flat layouts divide by the query's head size."""
        if "N" in self.layout:
            return self.key[self.layout.index("N")]
        return self.key[2] // self.q.dim

    @cached_property
    def k(self) -> AxisSizes:
        return read_sizes(self.layout, self.key, self.kv_heads)

    @cached_property
    def v(self) -> AxisSizes:
        return read_sizes(self.layout, self.value, self.kv_heads)

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        atten_mask: torch.Tensor | None = None,
        pse: torch.Tensor | None = None,
        others: Mapping[str, object] | None = None,
        **settings: object,
    ) -> FusionAttentionCall:
        """The description of a call with these tensors. `settings` are the fields that are not tensors."""
        for name, tensor in (("atten_mask", atten_mask), ("pse", pse)):
            if tensor is not None:
                settings |= {name: tuple(tensor.shape), f"{name}_dtype": tensor.dtype}
        return cls(
            query=tuple(query.shape),
            key=tuple(key.shape),
            value=tuple(value.shape),
            query_dtype=query.dtype,
            key_dtype=key.dtype,
            value_dtype=value.dtype,
            other_inputs=frozenset(name for name, given in (others or {}).items() if is_given(given)),
            **settings,  # type: ignore[arg-type]
        )


def _covered_inputs(call: FusionAttentionCall) -> str | None:
    if call.other_inputs:
        return f"{', '.join(sorted(call.other_inputs))} given: not covered by the emulation"
    return None


def _no_dropout(call: FusionAttentionCall) -> str | None:
    if call.keep_prob != 1.0:
        return f"keep_prob = {call.keep_prob}: dropout is not covered by the emulation"
    return None


def _dtypes(call: FusionAttentionCall) -> str | None:
    if call.query_dtype not in FUSION_DTYPES:
        return f"query is {dtype_name(call.query_dtype)}; the kernel takes float16, bfloat16 and float32"
    for name, dtype in (("key", call.key_dtype), ("value", call.value_dtype)):
        if dtype != call.query_dtype:
            return f"{name} is {dtype_name(dtype)} but query is {dtype_name(call.query_dtype)}; they must agree"
    return None


def _layout(call: FusionAttentionCall) -> str | None:
    if call.layout in UNCOVERED_LAYOUTS:
        return f"layout {call.layout}: not covered by the emulation"
    if call.layout not in FUSION_LAYOUTS:
        return f"layout {call.layout} is not one of {', '.join(FUSION_LAYOUTS + UNCOVERED_LAYOUTS)}"
    return None


def _ranks(call: FusionAttentionCall) -> str | None:
    for name, shape in (("query", call.query), ("key", call.key), ("value", call.value)):
        if len(shape) != len(call.layout):
            return f"{name} has {len(shape)} axes; layout {call.layout} has {len(call.layout)}"
    return None


def _head_num(call: FusionAttentionCall) -> str | None:
    if not 0 < call.head_num <= MAX_HEADS:
        return f"head_num = {call.head_num} is not in 1..{MAX_HEADS}"
    if "H" in call.layout and guard(call.query[2] % call.head_num != 0):
        return f"query has H = {call.query[2]}, not a multiple of its {call.head_num} heads"
    if guard(call.q.heads != call.head_num):
        return f"query has {call.q.heads} heads but the call says {call.head_num}"
    return None


def _dims(call: FusionAttentionCall) -> str | None:
    if guard(call.q.dim < 1) or guard(call.q.dim > MAX_DIM):
        return f"D = {call.q.dim} is not in 1..{MAX_DIM}"
    return None


def _kv_heads(call: FusionAttentionCall) -> str | None:
    if "H" in call.layout and guard(call.key[2] % call.q.dim != 0):
        return f"key has H = {call.key[2]}, not a multiple of D = {call.q.dim}"
    if guard(call.kv_heads < 1) or guard(call.q.heads % call.kv_heads != 0):
        return f"N = {call.q.heads} is not a multiple of Nk = {call.kv_heads}"
    return None


def _key_value(call: FusionAttentionCall) -> str | None:
    if guard(call.k.dim != call.q.dim):
        return f"key has D = {call.k.dim} but query has D = {call.q.dim}; they must agree"
    if guard(call.k.batch != call.q.batch):
        return f"key has B = {call.k.batch} but query has B = {call.q.batch}; they must agree"
    if "H" in call.layout and guard(call.value[2] % call.kv_heads != 0):
        return f"value has H = {call.value[2]}, not a multiple of its {call.kv_heads} heads"
    if shapes_differ(tuple(call.k)[:3], tuple(call.v)[:3]):
        return f"key is {call.key} but value is {call.value}; they may differ in D only"
    return None


def _lengths(call: FusionAttentionCall) -> str | None:
    for name, length in (("S1", call.q.length), ("S2", call.k.length)):
        if guard(length > MAX_LENGTH):
            return f"{name} = {length} exceeds {MAX_LENGTH}"
    return None


def _mode(call: FusionAttentionCall) -> str | None:
    if call.sparse_mode in UNCOVERED_MODES:
        return f"sparse_mode = {call.sparse_mode}: not covered by the emulation"
    if call.sparse_mode not in DENSE_MODES + COMPRESSED_MODES:
        return f"sparse_mode = {call.sparse_mode} is not supported"
    return None


def _mask(call: FusionAttentionCall) -> str | None:
    mask = call.atten_mask
    if mask is None:
        return None
    if call.atten_mask_dtype not in FUSION_MASK_DTYPES:
        return f"atten_mask is {dtype_name(call.atten_mask_dtype)}; the kernel takes bool and uint8"
    if call.sparse_mode in COMPRESSED_MODES:
        return compressed_mask_sentence(mask, call.sparse_mode)
    batch, heads, rows, keys = call.q.batch, call.q.heads, call.q.length, call.k.length
    allowed = ((rows, keys), (1, 1, rows, keys), (batch, 1, rows, keys), (batch, heads, rows, keys))
    if all(shapes_differ(mask, shape) for shape in allowed):
        return f"atten_mask is {mask}; it must be (S1, S2), (1, 1, S1, S2), (B, 1, S1, S2) or (B, N, S1, S2)"
    return None


def _pse(call: FusionAttentionCall) -> str | None:
    if call.pse is None:
        return None
    if call.pse_dtype != call.query_dtype:
        seen, query = dtype_name(call.pse_dtype), dtype_name(call.query_dtype)
        return f"pse is {seen} but query is {query}; they must agree"
    tail = (call.q.heads, call.q.length, call.k.length)
    if shapes_differ(call.pse, (1, *tail)) and shapes_differ(call.pse, (call.q.batch, *tail)):
        return f"pse is {call.pse}; the emulation covers (B, N, S1, S2) and (1, N, S1, S2)"
    return None


FUSION_ATTENTION_RULES: tuple[Rule[FusionAttentionCall], ...] = (
    Rule("covered_inputs", EMULATION, _covered_inputs),
    Rule("no_dropout", EMULATION, _no_dropout),
    Rule("dtypes", DOCS_FUSION, _dtypes),
    Rule("layout", f"{DOCS_FUSION}; {EMULATION}", _layout, gate=True),
    Rule("ranks", DOCS_FUSION, _ranks, gate=True),
    Rule("head_num", DOCS_FUSION, _head_num, gate=True),
    Rule("dims", DOCS_FUSION, _dims, gate=True),
    Rule("kv_heads", DOCS_FUSION, _kv_heads, gate=True),
    Rule("key_value", DOCS_FUSION, _key_value),
    Rule("lengths", DOCS_FUSION, _lengths),
    Rule("mode", f"{DOCS_FUSION}; {EMULATION}", _mode),
    Rule("mask", DOCS_FUSION, _mask),
    Rule("pse", f"{DOCS_FUSION}; {EMULATION}", _pse),
)
