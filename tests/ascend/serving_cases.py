"""Steps of a serving engine for both of Ascend's compilers: packed prefill, paged decode, drafts, mixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from hand_over_cases import BF16, FP16, compiled, rand, to_npu
from packed_cases import formula
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

import sgl_npu
from sgl_npu import ops
from sgl_npu.compiler.report import Report

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 64, 128
TABLE = torch.tensor([[5, 2, 0], [1, 4, 0], [3, 0, 0]], dtype=torch.int32)


def slots_of(ends: Sequence[int], lengths: Sequence[int], padding: int = 0) -> Tensor:
    """Where the new tokens of each sequence go; the last `padding` ones go nowhere."""
    found = []
    for row, start, end, length in zip(TABLE.tolist(), (0, *ends), ends, lengths, strict=False):
        positions = range(length - (end - start), length)
        found += [row[i // BLOCK] * BLOCK + i % BLOCK for i in positions]
    found[len(found) - padding :] = [-1] * padding
    return torch.tensor(found)


def step(causal: bool, window: tuple[int, int] = (-1, -1), padded: bool = True) -> Callable:
    """A layer's attention in a step: its keys into the cache, then all queries over the cache."""

    def run(query, key, value, key_cache, value_cache, slots, table, ends, lengths):
        ops.update_kv_cache(key_cache, value_cache, key, value, slots, padded=padded)
        return 2 * ops.attention(
            query + 1,
            key_cache,
            value_cache,
            actual_seq_lengths=ends,
            actual_seq_lengths_kv=lengths,
            block_table=table,
            block_size=BLOCK,
            causal=causal,
            window_size=window,
        )

    return run


def call(ends: Sequence[int], lengths: Sequence[int], padding: int = 0, dtype=BF16) -> tuple:
    tokens = ends[-1]
    caches = (rand(6, BLOCK, KV_HEADS, DIM, dtype=dtype) for _ in range(2))
    new = (rand(tokens, KV_HEADS, DIM, dtype=dtype) for _ in range(2))
    slots, table = slots_of(ends, lengths, padding), TABLE[: len(ends)]
    return rand(tokens, HEADS, DIM, dtype=dtype), *new, *caches, slots, table, list(ends), list(lengths)


def packed(query: Tensor, key: Tensor, value: Tensor, ends: list[int], kv_ends: list[int]) -> Tensor:
    return ops.attention(query + 1, key, value, actual_seq_lengths=ends, actual_seq_lengths_kv=kv_ends, causal=True)


def packed_call(ends: Sequence[int]) -> tuple:
    return rand(ends[-1], HEADS, DIM), *(rand(ends[-1], KV_HEADS, DIM) for _ in range(2)), list(ends), list(ends)


# A case: the function, the arguments of every call, the kernel, and the op's sparse_mode.
STEPS: dict[str, tuple[Callable, list[tuple], str, str | None]] = {
    "decode": (step(True), [call([1, 2, 3], x) for x in ([7, 130, 9], [8, 131, 10], [200, 5, 17])],
               "ascend_packed", "3"),
    "decode with padding": (step(True), [call([1, 2, 3], x, padding=1) for x in ([7, 130, 9], [8, 131, 10])],
                            "ascend_packed", "3"),
    "decode without padding": (step(True, padded=False), [call([1, 2, 3], x) for x in ([7, 130, 9], [8, 131, 10])],
                               "ascend_packed", "3"),
    "drafts": (step(True), [call([4, 8, 12], x) for x in ([7, 130, 9], [8, 131, 10], [200, 5, 17])],
               "ascend_packed", "3"),
    "drafts that see everything": (step(False), [call([4, 8, 12], x) for x in ([7, 130, 9], [8, 131, 10])],
                                   "ascend_packed", None),
    "a window": (step(True, (3, 0)), [call([4, 8, 12], x) for x in ([7, 130, 9], [8, 131, 10])],
                 "ascend_packed", "4"),
    "prefill and decode": (step(True), [call([5, 6, 30], [9, 130, 60]), call([1, 40, 41], [8, 90, 61]),
                                        call([11, 12, 13], [12, 131, 62])], "ascend_packed", "3"),
    "decode in float16": (step(True), [call([1, 2, 3], x, dtype=FP16) for x in ([7, 130, 9], [8, 131, 10])],
                          "ascend_paged_batched", None),
    "drafts in float16": (step(True), [call([4, 8, 12], x, dtype=FP16) for x in ([7, 130, 9], [8, 131, 10])],
                          "ascend_paged_batched", "3"),
    "packed prefill": (packed, [packed_call(x) for x in ([5, 9, 20], [7, 8, 31], [9, 25, 26])], "ascend_packed", "3"),
}  # fmt: skip


def check_varlen(options: dict) -> Report:
    """torch's varlen_attn, which has no kernel on a CPU, against the formula; the report of its one graph."""

    def run(query, key, value, starts):
        return varlen_attn(query + 1, key, value, starts, starts, 64, 64, window_size=(-1, 0), enable_gqa=True)

    on_device = compiled(run, options, dynamic=True)
    before = len(sgl_npu.reports())
    for ends in ([5, 9, 20], [7, 8, 31], [9, 25, 26]):
        query, key, value, *_ = packed_call(ends)
        with torch.no_grad():
            found = on_device(*to_npu((query, key, value, torch.tensor([0, *ends], dtype=torch.int32))))
        lengths = [(end - start,) * 2 for start, end in zip((0, *ends), ends, strict=False)]
        expected, _ = formula(query + 1, key, value, lengths, causal=True)
        torch.testing.assert_close(found.cpu().double(), expected, atol=3e-2, rtol=3e-2)
    (report,) = sgl_npu.reports()[before:]
    return report


def check_documents(options: dict) -> list[Report]:
    """Packed batches known by position ids, of several lengths and numbers of documents; the last has too many."""

    def run(query, key, value, position_ids):
        ids = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        same, ordered = ids[:, :, None] == ids[:, None, :], position_ids[:, None, :] <= position_ids[:, :, None]
        mask = (same & ordered)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(query + 1, key, value, mask, enable_gqa=True)

    on_device = compiled(run, options, dynamic=True)
    before = len(sgl_npu.reports())
    for lengths in ([5, 4, 11], [31], [1, 2, 3, 4, 5, 6], [1] * 70):
        ends = list(accumulate(lengths))
        query, key, value, *_ = packed_call(ends)
        position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        rows = [x.transpose(0, 1)[None] for x in (query, key, value)]
        with torch.no_grad():
            found = on_device(*to_npu((*rows, position_ids))).cpu()
        expected, _ = formula(query + 1, key, value, [(n, n) for n in lengths], causal=True)
        torch.testing.assert_close(found[0].transpose(0, 1).double(), expected, atol=3e-2, rtol=3e-2)
    return sgl_npu.reports()[before:]
