"""What a call of a sparse attention op computes: its sequences, and the key blocks of each block of queries.

| op | key blocks are given as | layout |
|---|---|---|
| sgl_npu.block_attention | bool mask | BNSD |
| sgl_npu.block_sparse_attention | int8 mask, columns rounded up | BNSD |
| sgl_npu.rain_fusion_attention | lists and their lengths | BNSD, TND |
| npu.npu_block_sparse_attention | int8 mask | BNSD, TND |

No site of a graph has a causal call: sparse kernels refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sgl_npu.runtime.npu.layouts import sequences
from sgl_npu.runtime.npu.rain_fusion_attention import chosen_blocks
from sgl_npu.runtime.npu.sparse_blocks import blocks

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class SparseSequence:
    """One sequence of a call, in the order of tokens that the kernel gets.

    `query` (Hq, S, D), `key` (Hkv, Skv, D), `value` (Hkv, Skv, Dv) and `out` (Hq, S, Dv) are views. `selected`: bool
    (Hq, query blocks, key blocks), for blocks of `block_shape` queries and keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    selected: Tensor
    block_shape: tuple[int, int]
    scale: float


@dataclass(frozen=True)
class _Selection:
    """`masks`: of each sequence, bool (Hq, query blocks, key blocks). `lengths`: of its queries and keys."""

    masks: Sequence[Tensor]
    block_shape: tuple[int, int]
    layout: str
    lengths: tuple[Sequence[int], Sequence[int]]
    scale: float


def _whole(given: Arguments) -> tuple[Sequence[int], Sequence[int]]:
    """Lengths of a batch that has no padding."""
    query, key = given["query"], given["key"]
    return [query.size(2)] * query.size(0), [key.size(2)] * key.size(0)


def _of_block_attention(given: Arguments) -> _Selection:
    size = given["size"]
    return _Selection(given["blocks"].unbind(), (size, size), "BNSD", _whole(given), given["scale"])


def _of_block_sparse_attention(given: Arguments) -> _Selection:
    size = given["sparse_size"]
    mask = given["sparse_mask"][..., : blocks(given["key"].size(2), size)].bool()
    return _Selection(mask.unbind(), (size, size), "BNSD", _whole(given), given["scale"])


def _of_rain_fusion_attention(given: Arguments) -> _Selection:
    lengths = given["actual_seq_qlen"], given["actual_seq_kvlen"]
    rows, columns = given["block_shape"]
    counts = [blocks(length, rows) for length in lengths[0]]
    listed, named = given["select_idx"].split(counts), given["select_num_idx"].split(counts)
    masks = [
        chosen_blocks(lists, count, blocks(keys, columns))
        for lists, count, keys in zip(listed, named, lengths[1], strict=True)
    ]
    return _Selection(masks, (rows, columns), given["input_layout"], lengths, given["scale"])


def _of_npu_block_sparse_attention(given: Arguments) -> _Selection:
    lengths = given["actual_seq_lengths"], given["actual_seq_lengths_kv"]
    rows, columns = given["block_shape"]
    queries, keys = _whole(given) if lengths[0] is None else lengths
    masks = [
        mask[:, : blocks(s, rows), : blocks(skv, columns)].bool()
        for mask, s, skv in zip(given["block_sparse_mask"], queries, keys, strict=True)
    ]
    return _Selection(masks, (rows, columns), given["q_input_layout"], (queries, keys), given["scale_value"])


READERS: dict[str, Callable[[Arguments], _Selection]] = {
    "sgl_npu.block_attention": _of_block_attention,
    "sgl_npu.block_sparse_attention": _of_block_sparse_attention,
    "sgl_npu.rain_fusion_attention": _of_rain_fusion_attention,
    "npu.npu_block_sparse_attention": _of_npu_block_sparse_attention,
}


def op_name(target: Any) -> str:
    """The op as the report and `READERS` name it."""
    return str(target).removesuffix(".default")


def sparse_sequences(target: Any, args: Sequence[Any], kwargs: Arguments, result: Any) -> Iterator[SparseSequence]:
    """The sequences of one call of an op of `READERS`, without those that are empty."""
    given = {x.name: x.default_value for x in target._schema.arguments}
    given.update(zip(given, args, strict=False))
    given.update(kwargs)
    found = READERS[op_name(target)](given)
    queries, keys = found.lengths
    parts = zip(
        sequences(found.layout, given["query"], queries),
        sequences(found.layout, given["key"], keys),
        sequences(found.layout, given["value"], keys),
        sequences(found.layout, result[0] if isinstance(result, tuple) else result, queries),
        found.masks,
        strict=True,
    )
    for query, key, value, out, selected in parts:
        if query.size(1) and key.size(1):
            yield SparseSequence(query, key, value, out, selected, found.block_shape, found.scale)
