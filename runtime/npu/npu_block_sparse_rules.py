"""Limits of npu_block_sparse_attention, the block-sparse attention of torch_npu itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgl_npu.runtime.npu.fia_call import Shape
from sgl_npu.runtime.npu.fia_rules import FLOATS, dtype_name, outside, shapes_differ
from sgl_npu.runtime.npu.layouts import AxisSizes, read_sizes
from sgl_npu.runtime.npu.rule import Rule
from sgl_npu.runtime.npu.sources import DOCS_NPU_BLOCK_SPARSE, META, TILING_NPU_BLOCK_SPARSE
from sgl_npu.runtime.npu.sparse_blocks import blocks
from sgl_npu.runtime.sizes import Size, guard

LAYOUTS = ("TND", "BNSD")
DIMS = (64, 128)
KEY_BLOCK_MULTIPLE = 128
FLAGS = (0, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class NpuBlockSparseCall:
    """Arguments of npu_block_sparse_attention. Shapes are tuples of int or SymInt.

    Lengths are those of the sequences, not cumulative; None for all of S. The properties presuppose the gate rules.
    """

    query: Shape
    key: Shape
    value: Shape
    dtypes: tuple[torch.dtype, ...]
    mask: Shape
    mask_dtype: torch.dtype
    block_shape: Sequence[int]
    q_input_layout: str = "TND"
    kv_input_layout: str = "TND"
    num_key_value_heads: int = 1
    inner_precise: int = 1
    actual_seq_lengths: Sequence[Size] | None = None
    actual_seq_lengths_kv: Sequence[Size] | None = None
    softmax_lse_flag: int | None = 0

    @property
    def q(self) -> AxisSizes:
        return read_sizes(self.q_input_layout, self.query, 0)

    @property
    def k(self) -> AxisSizes:
        return read_sizes(self.kv_input_layout, self.key, 0)

    @property
    def batch(self) -> Size:
        """Of packed sequences there are as many as lengths."""
        return self.q.batch if self.q_input_layout == "BNSD" else len(self.actual_seq_lengths or ())

    @property
    def longest(self) -> tuple[Size, Size]:
        """Rows and keys that the mask has blocks for: the tensor's, and of packed sequences those of the longest."""
        if self.q_input_layout == "BNSD":
            return self.q.length, self.k.length
        return max(self.actual_seq_lengths or (0,)), max(self.actual_seq_lengths_kv or (0,))

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        block_shape: Sequence[int],
        **settings: object,
    ) -> NpuBlockSparseCall:
        """The description of a call with these tensors. `settings` are the fields that are not tensors."""
        return cls(
            query=tuple(query.shape),
            key=tuple(key.shape),
            value=tuple(value.shape),
            dtypes=(query.dtype, key.dtype, value.dtype),
            mask=tuple(mask.shape),
            mask_dtype=mask.dtype,
            block_shape=block_shape,
            **settings,  # type: ignore[arg-type]
        )


def _layouts(call: NpuBlockSparseCall) -> str | None:
    for name, layout in (("q_input_layout", call.q_input_layout), ("kv_input_layout", call.kv_input_layout)):
        if layout not in LAYOUTS:
            return f"{name} = {layout}; the kernel takes TND and BNSD"
    if call.q_input_layout != call.kv_input_layout:
        return f"the query is {call.q_input_layout}, key and value {call.kv_input_layout}; they must have one layout"
    return None


def _ranks(call: NpuBlockSparseCall) -> str | None:
    axes = len(call.q_input_layout)
    for name, shape in (("query", call.query), ("key", call.key), ("value", call.value)):
        if len(shape) != axes:
            return f"{name} has {len(shape)} axes; layout {call.q_input_layout} has {axes}"
    return None


def _not_empty(call: NpuBlockSparseCall) -> str | None:
    for name, shape in (("query", call.query), ("key", call.key)):
        if any(guard(size == 0) for size in shape):
            return f"{name} is {tuple(shape)}; no size may be 0"
    return None


def _block_shape(call: NpuBlockSparseCall) -> str | None:
    if len(call.block_shape) < 2 or min(call.block_shape[:2]) < 1:
        return f"block_shape = {list(call.block_shape)}; it must be two sizes of 1 and more"
    if call.block_shape[1] % KEY_BLOCK_MULTIPLE != 0:
        return f"block_shape = {list(call.block_shape)}; blocks of keys must be a multiple of {KEY_BLOCK_MULTIPLE}"
    return None


def _dtypes(call: NpuBlockSparseCall) -> str | None:
    if len(set(call.dtypes)) != 1 or call.dtypes[0] not in FLOATS:
        return f"the tensors are {', '.join(map(dtype_name, call.dtypes))}; all must be float16 or all bfloat16"
    return None


def _precision(call: NpuBlockSparseCall) -> str | None:
    if call.inner_precise not in FLAGS:
        return f"inner_precise = {call.inner_precise} is not one of {FLAGS}"
    if call.dtypes[0] == torch.bfloat16 and call.inner_precise != 0:
        return f"inner_precise = {call.inner_precise}; bfloat16 takes 0"
    return None


def _dims(call: NpuBlockSparseCall) -> str | None:
    if outside(call.q.dim, DIMS):
        return f"D = {call.q.dim} is not one of {', '.join(map(str, DIMS))}"
    return None


def _heads(call: NpuBlockSparseCall) -> str | None:
    if guard(call.k.heads != call.num_key_value_heads):
        return f"key has {call.k.heads} heads but the call says {call.num_key_value_heads}"
    if guard(call.q.heads % call.k.heads != 0):
        return f"N = {call.q.heads} is not a multiple of Nk = {call.k.heads}"
    return None


def _shapes(call: NpuBlockSparseCall) -> str | None:
    if shapes_differ(call.value, call.key):
        return f"value is {tuple(call.value)} and key is {tuple(call.key)}; they must have one shape"
    for name, one, other in (("B", call.q.batch, call.k.batch), ("D", call.q.dim, call.k.dim)):
        if guard(one != other):
            return f"{name} is {one} in query and {other} in key; they must agree"
    return None


def _lengths(call: NpuBlockSparseCall) -> str | None:
    rows, keys = call.actual_seq_lengths, call.actual_seq_lengths_kv
    if (rows is None) != (keys is None):
        given = "actual_seq_lengths" if keys is None else "actual_seq_lengths_kv"
        return f"{given} alone is given; both lists or none"
    if rows is None or keys is None:
        return "actual_seq_lengths is not given; layout TND needs both lists" if call.q_input_layout == "TND" else None
    for name, lengths, sizes in (("actual_seq_lengths", rows, call.q), ("actual_seq_lengths_kv", keys, call.k)):
        if any(guard(length < 0) for length in lengths):
            return f"{name} = {list(lengths)}; no length may be below 0"
        if call.q_input_layout == "BNSD":
            if guard(sizes.batch != len(lengths)):
                return f"{name} has {len(lengths)} entries, but B = {sizes.batch}"
            if any(guard(length > sizes.length) for length in lengths):
                return f"{name} = {list(lengths)}; no length may exceed S = {sizes.length}"
        elif guard(sum(lengths) != sizes.length):
            return f"{name} = {list(lengths)} adds up to {sum(lengths)}, not to T = {sizes.length}"
    if len(rows) != len(keys):
        return (
            f"actual_seq_lengths has {len(rows)} entries and actual_seq_lengths_kv {len(keys)}; one per sequence each"
        )
    return None


def _mask(call: NpuBlockSparseCall) -> str | None:
    if call.mask_dtype != torch.int8:
        return f"block_sparse_mask is {dtype_name(call.mask_dtype)}; it must be int8"
    counts = (blocks(length, block) for length, block in zip(call.longest, call.block_shape, strict=False))
    expected = (call.batch, call.q.heads, *counts)
    if shapes_differ(call.mask, expected):
        return f"block_sparse_mask is {tuple(call.mask)}; it must be (B, N, query blocks, key blocks) = {expected}"
    return None


def _lse_flag(call: NpuBlockSparseCall) -> str | None:
    if call.softmax_lse_flag not in (None, *FLAGS):
        return f"softmax_lse_flag = {call.softmax_lse_flag} is not one of {FLAGS}"
    return None


NPU_BLOCK_SPARSE_RULES: tuple[Rule[NpuBlockSparseCall], ...] = (
    Rule("layouts", DOCS_NPU_BLOCK_SPARSE, _layouts, gate=True),
    Rule("ranks", f"{META}; {TILING_NPU_BLOCK_SPARSE}", _ranks, gate=True),
    Rule("not_empty", TILING_NPU_BLOCK_SPARSE, _not_empty, gate=True),
    Rule("block_shape", f"{META}; {DOCS_NPU_BLOCK_SPARSE}", _block_shape, gate=True),
    Rule("dtypes", DOCS_NPU_BLOCK_SPARSE, _dtypes),
    Rule("precision", f"{META}; {DOCS_NPU_BLOCK_SPARSE}", _precision),
    Rule("dims", DOCS_NPU_BLOCK_SPARSE, _dims),
    Rule("heads", DOCS_NPU_BLOCK_SPARSE, _heads),
    Rule("shapes", TILING_NPU_BLOCK_SPARSE, _shapes, gate=True),
    Rule("lengths", DOCS_NPU_BLOCK_SPARSE, _lengths, gate=True),
    Rule("mask", DOCS_NPU_BLOCK_SPARSE, _mask),
    Rule("lse_flag", TILING_NPU_BLOCK_SPARSE, _lse_flag),
)
