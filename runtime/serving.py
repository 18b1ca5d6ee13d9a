"""What a serving engine calls: attention over packed sequences with packed or paged keys, and the update of the cache.

Names and layouts are those of torch_npu's fused infer attention and of the engines that call it: tokens of all
sequences end to end, host lists of lengths, a cache of blocks and a table of the blocks of each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import SymInt, Tensor

from sgl_npu.runtime.cache_update import update_kv_cache as _update
from sgl_npu.runtime.packed_attention import packed_attention
from sgl_npu.runtime.sizes import Size, guard


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    actual_seq_lengths: Sequence[Size],
    actual_seq_lengths_kv: Sequence[Size],
    block_table: Tensor | None = None,
    block_size: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of B sequences that lie end to end, prefill, decode and draft blocks in any mixture.

    query: (T, Hq, D), float16, bfloat16, float32 or float64, any strides.
    key, value: (Tk, Hkv, D) and (Tk, Hkv, Dv), packed; or beside a `block_table` the caches
        (blocks, block_size, Hkv, D) and (blocks, block_size, Hkv, Dv). Dtype of query; Hq % Hkv == 0.
    actual_seq_lengths: B ints, where the queries of each sequence end: cumulative, no 0 in front, the last is T.
    actual_seq_lengths_kv: B ints. Packed keys: where the keys of each sequence end. Paged keys: how many keys each
        sequence has, those of its queries included, once.
    block_table: int32 (B, M), the blocks of each sequence in order; what is past its keys is not read.
    block_size: rows of a block, checked against the cache if given.
    scale: of the scores, D ** -0.5 if not given.
    causal: each query attends up to its own position. The queries of a sequence are its newest tokens: query i of Sq
        has position i + Skv - Sq.
    window_size: (left, right), how far before and after its position a query attends; -1 is no limit.
    softcap: scores become softcap * tanh(scores / softcap); 0 is none.
    sinks: (Hq,), one more score per head that takes part in the softmax and has no value.

    Returns out (T, Hq, Dv) in the dtype of query, contiguous; with `return_lse` also the log-sum-exp of the scores
    (T, Hq), float32. A query that may attend nothing gives 0 and -inf. There is no backward.

    Raises ValueError for shapes, dtypes and lengths that do not fit each other.
    """
    if block_size is not None:
        if block_table is None:
            raise ValueError(f"ops.attention: block_size = {block_size} without a block_table; pass both, or neither")
        if guard(key.size(1) != block_size):
            raise ValueError(
                f"ops.attention: block_size = {block_size}, but the cache has blocks of {key.size(1)} rows: "
                f"{tuple(key.shape)}"
            )
    for name, lengths in (
        ("actual_seq_lengths", actual_seq_lengths),
        ("actual_seq_lengths_kv", actual_seq_lengths_kv),
    ):
        if not isinstance(lengths, (list, tuple)) or not all(isinstance(x, (int, SymInt)) for x in lengths):
            raise ValueError(
                f"ops.attention: {name} is no list of Python ints but {_kind(lengths)}: the kernel takes its lengths "
                "from the host; call .tolist() on a tensor or an array before the model runs"
            )
    if not isinstance(window_size, (list, tuple)) or len(window_size) != 2:
        raise ValueError(f"ops.attention: window_size = {window_size!r}: give (left, right), -1 for no limit")
    before, after = (_side(window_size, index) for index in (0, 1))
    out, lse = packed_attention(
        query,
        key,
        value,
        actual_seq_lengths,
        actual_seq_lengths_kv,
        block_table,
        sinks,
        scale=1.0 / math.sqrt(query.size(-1)) if scale is None else scale,
        softcap=softcap,
        before=before,
        after=0 if causal else after,
    )
    return (out, lse) if return_lse else out


def _kind(lengths: object) -> str:
    if isinstance(lengths, (list, tuple)):
        return f"a {type(lengths).__name__} of {', '.join(sorted({type(x).__name__ for x in lengths}))}"
    return f"a {type(lengths).__name__}"


def _side(window_size: tuple[int, int], index: int) -> int | None:
    side = window_size[index]
    if side < -1:
        raise ValueError(f"ops.attention: window_size = {tuple(window_size)}: a side is -1 (no limit) or at least 0")
    return None if side == -1 else side


def update_kv_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    *,
    padded: bool = True,
) -> None:
    """Write the keys and values of T tokens to their slots of a paged cache, in place.

    key_cache, value_cache: (blocks, block_size, Hkv, D) and (blocks, block_size, Hkv, Dv), contiguous.
    key, value: (T, Hkv, D) and (T, Hkv, Dv), dtypes of the caches.
    slot_mapping: int32 or int64 (T,); slot `b * block_size + i` is row i of block b. Tokens with a negative slot are
        padding and change nothing. The other slots must be less than blocks * block_size and differ from each other,
        which is not checked.
    padded: False promises that no slot is negative (padding has a slot of its own, say), which saves work.

    Raises ValueError for shapes and dtypes that do not fit each other.
    """
    _update(key_cache, value_cache, key, value, slot_mapping, padded)
