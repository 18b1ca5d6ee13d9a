"""sgl_npu::rain_fusion_attention: attention over listed key blocks, per query block and head.

Lengths are per sequence, not cumulative. `select_idx` (query blocks of all sequences, N, most key blocks) lists the
key blocks of each query block in ascending order, -1 behind the last; `select_num_idx` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgl_npu.runtime.npu.fia_call import Shape
from sgl_npu.runtime.npu.fia_rules import FLOATS, dtype_name, shapes_differ
from sgl_npu.runtime.npu.kernel_package import require
from sgl_npu.runtime.npu.layouts import sequences
from sgl_npu.runtime.npu.rule import Rule, reject
from sgl_npu.runtime.npu.sequence_attention import attend
from sgl_npu.runtime.npu.sparse_blocks import blocks
from sgl_npu.runtime.sizes import Size, guard

OP = "rain_fusion_attention"
SCHEMA = (
    f"{OP}(Tensor query, Tensor key, Tensor value, Tensor select_idx, Tensor select_num_idx,"
    " SymInt[] actual_seq_qlen, SymInt[] actual_seq_kvlen, float scale, int[] block_shape, str input_layout='TND',"
    " int inner_precise=0) -> Tensor"
)
RANKS = {"TND": 3, "BNSD": 4}
PRECISIONS = (0, 1)
MAX_GROUP = 128
DOCS = "CANN docs: aclnnRainFusionAttention (2026)"


@dataclass(frozen=True, kw_only=True, eq=False)
class RainFusionCall:
    """Arguments of rain_fusion_attention. Shapes are tuples of int or SymInt."""

    query: Shape
    key: Shape
    value: Shape
    dtypes: tuple[torch.dtype, ...]
    select_idx: Shape
    select_num_idx: Shape
    select_dtypes: tuple[torch.dtype, ...]
    actual_seq_qlen: Sequence[Size]
    actual_seq_kvlen: Sequence[Size]
    block_shape: Sequence[int]
    input_layout: str = "TND"
    inner_precise: int = 0

    @property
    def heads(self) -> tuple[Size, Size]:
        """N and Nk."""
        axis = self.input_layout.index("N")
        return self.query[axis], self.key[axis]

    @property
    def query_blocks(self) -> Size:
        total: Size = 0
        for rows in self.actual_seq_qlen:
            total = total + blocks(rows, self.block_shape[0])
        return total


def _layout(call: RainFusionCall) -> str | None:
    if call.input_layout not in RANKS:
        return f"input_layout = {call.input_layout}; the kernel takes TND and BNSD"
    for name, shape in (("query", call.query), ("key", call.key), ("value", call.value)):
        if len(shape) != RANKS[call.input_layout]:
            return f"{name} has {len(shape)} axes; layout {call.input_layout} has {RANKS[call.input_layout]}"
    return None


def _block_shape(call: RainFusionCall) -> str | None:
    if len(call.block_shape) != 2 or min(call.block_shape) < 1:
        return f"block_shape = {list(call.block_shape)}; it must be two sizes of 1 and more"
    return None


def _dtypes(call: RainFusionCall) -> str | None:
    if len(set(call.dtypes)) != 1 or call.dtypes[0] not in FLOATS:
        return f"the tensors are {', '.join(map(dtype_name, call.dtypes))}; all must be float16 or all bfloat16"
    for name, dtype in zip(("select_idx", "select_num_idx"), call.select_dtypes, strict=True):
        if dtype != torch.int64:
            return f"{name} is {dtype_name(dtype)}; it must be int64"
    return None


def _precision(call: RainFusionCall) -> str | None:
    if call.inner_precise not in PRECISIONS:
        return f"inner_precise = {call.inner_precise} is not one of {PRECISIONS}"
    if call.dtypes[0] == torch.bfloat16 and call.inner_precise != 0:
        return f"inner_precise = {call.inner_precise}; bfloat16 takes 0"
    return None


def _heads(call: RainFusionCall) -> str | None:
    heads, kv_heads = call.heads
    if guard(heads % kv_heads != 0):
        return f"N = {heads} is not a multiple of Nk = {kv_heads}"
    group = heads // kv_heads
    if guard(group >= MAX_GROUP) or guard(MAX_GROUP % group != 0):
        return f"N / Nk = {group} is not a divisor of {MAX_GROUP} below it"
    return None


def _shapes(call: RainFusionCall) -> str | None:
    if shapes_differ(call.value, call.key):
        return f"value is {tuple(call.value)} and key is {tuple(call.key)}; they must have one shape"
    if guard(call.query[-1] != call.key[-1]):
        return f"D is {call.query[-1]} in query and {call.key[-1]} in key; they must agree"
    return None


def _lengths(call: RainFusionCall) -> str | None:
    rows, keys = call.actual_seq_qlen, call.actual_seq_kvlen
    if not rows or len(rows) != len(keys):
        return f"actual_seq_qlen has {len(rows)} entries and actual_seq_kvlen {len(keys)}; one per sequence each"
    for name, lengths, shape in (("actual_seq_qlen", rows, call.query), ("actual_seq_kvlen", keys, call.key)):
        if call.input_layout == "BNSD":
            if guard(shape[0] != len(lengths)):
                return f"{name} has {len(lengths)} entries, but B = {shape[0]}"
            if any(guard(length > shape[2]) or guard(length < 0) for length in lengths):
                return f"{name} = {list(lengths)}; no length may exceed S = {shape[2]}"
        elif guard(sum(lengths) != shape[0]) or any(guard(length < 0) for length in lengths):
            return f"{name} = {list(lengths)} adds up to {sum(lengths)}, not to T = {shape[0]}"
    return None


def _selection(call: RainFusionCall) -> str | None:
    expected = (call.query_blocks, call.heads[0])
    if shapes_differ(call.select_num_idx, expected):
        return f"select_num_idx is {tuple(call.select_num_idx)}; it must be {expected}"
    if len(call.select_idx) != 3 or shapes_differ(call.select_idx[:2], expected):
        return f"select_idx is {tuple(call.select_idx)}; it must be (*{expected}, most key blocks)"
    return None


RAIN_FUSION_RULES: tuple[Rule[RainFusionCall], ...] = (
    Rule("layout", DOCS, _layout, gate=True),
    Rule("block_shape", DOCS, _block_shape, gate=True),
    Rule("dtypes", DOCS, _dtypes),
    Rule("precision", DOCS, _precision),
    Rule("heads", DOCS, _heads),
    Rule("shapes", DOCS, _shapes, gate=True),
    Rule("lengths", DOCS, _lengths, gate=True),
    Rule("selection", DOCS, _selection),
)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    select_idx: torch.Tensor,
    select_num_idx: torch.Tensor,
    **settings: object,
) -> None:
    call = RainFusionCall(
        query=tuple(query.shape),
        key=tuple(key.shape),
        value=tuple(value.shape),
        dtypes=(query.dtype, key.dtype, value.dtype),
        select_idx=tuple(select_idx.shape),
        select_num_idx=tuple(select_num_idx.shape),
        select_dtypes=(select_idx.dtype, select_num_idx.dtype),
        **settings,  # type: ignore[arg-type]
    )
    reject(OP, call, RAIN_FUSION_RULES)


def chosen_blocks(listed: torch.Tensor, counts: torch.Tensor, key_blocks: int) -> torch.Tensor:
    """(N, query blocks, key blocks) bool, True where one sequence's lists (query blocks, N, width) name the key block.

    Entries behind the count of a list are not looked at.
    """
    named = torch.arange(listed.shape[2], device=listed.device) < counts[..., None]
    chosen = torch.zeros(*listed.shape[:2], key_blocks + 1, dtype=torch.bool, device=listed.device)
    chosen.scatter_(2, listed.masked_fill(~named, key_blocks), True)
    return chosen[..., :key_blocks].transpose(0, 1)


def _removed(
    listed: torch.Tensor, counts: torch.Tensor, rows: int, keys: int, block_shape: Sequence[int]
) -> torch.Tensor:
    """(N, rows, keys) bool, True where one sequence's lists (query blocks, N, width) do not name the key's block."""
    key_blocks = blocks(keys, block_shape[1])
    named = torch.arange(listed.shape[2]) < counts[..., None]
    if (named & ((listed < 0) | (listed >= key_blocks))).any():
        raise RuntimeError(f"{OP}: select_idx names blocks outside 0..{key_blocks - 1} of a sequence of {keys} keys")
    chosen = chosen_blocks(listed, counts, key_blocks)
    return ~chosen.repeat_interleave(block_shape[0], 1)[:, :rows].repeat_interleave(block_shape[1], 2)[..., :keys]


@torch.no_grad()
def rain_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    select_idx: torch.Tensor,
    select_num_idx: torch.Tensor,
    actual_seq_qlen: Sequence[int],
    actual_seq_kvlen: Sequence[int],
    scale: float,
    block_shape: Sequence[int],
    input_layout: str = "TND",
    inner_precise: int = 0,
) -> torch.Tensor:
    """CPU kernel. Rows past a sequence's length, unspecified on the hardware, are 0."""
    _check(query, key, value, select_idx, select_num_idx, actual_seq_qlen=actual_seq_qlen,
           actual_seq_kvlen=actual_seq_kvlen, block_shape=block_shape, input_layout=input_layout,
           inner_precise=inner_precise)  # fmt: skip
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    first = 0
    for q, k, v, into in zip(
        sequences(input_layout, query, actual_seq_qlen),
        sequences(input_layout, key, actual_seq_kvlen),
        sequences(input_layout, value, actual_seq_kvlen),
        sequences(input_layout, out, actual_seq_qlen),
        strict=True,
    ):
        last = first + blocks(q.shape[1], block_shape[0])
        lists = select_idx[first:last], select_num_idx[first:last]
        removed = _removed(*lists, q.shape[1], k.shape[1], block_shape)
        into.copy_(attend(q, k, v, scale=scale, removed=removed).out)
        first = last
    return out


def rain_fusion_attention_fake(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Shape and dtype, sizes possibly symbolic."""
    return query.new_empty(query.shape)


def rain_fusion_attention_npu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    select_idx: torch.Tensor,
    select_num_idx: torch.Tensor,
    actual_seq_qlen: Sequence[int],
    actual_seq_kvlen: Sequence[int],
    scale: float,
    block_shape: Sequence[int],
    input_layout: str = "TND",
    inner_precise: int = 0,
) -> torch.Tensor:
    """NPU kernel: sgl-kernel-npu's. Its head_num is the number of key heads, and what it returns as lse is not one."""
    _check(query, key, value, select_idx, select_num_idx, actual_seq_qlen=actual_seq_qlen,
           actual_seq_kvlen=actual_seq_kvlen, block_shape=block_shape, input_layout=input_layout,
           inner_precise=inner_precise)  # fmt: skip
    out, _ = require(OP)(
        query=query.contiguous(),
        key=key.contiguous(),
        value=value.contiguous(),
        select_idx=select_idx.contiguous(),
        select_num_idx=select_num_idx.contiguous(),
        blockshape=list(block_shape),
        attn_mask=None,
        actual_seq_qlen=list(actual_seq_qlen),
        actual_seq_kvlen=list(actual_seq_kvlen),
        block_table=None,
        q_input_layout=input_layout,
        kv_input_layout=input_layout,
        head_num=key.shape[input_layout.index("N")],
        mask_type=0,
        scale=scale,
        inner_precise=inner_precise,
        block_size=0,
    )
    return out
