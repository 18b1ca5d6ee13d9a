"""The op `sgl_npu::packed_attention`: attention over sequences that lie end to end, their keys packed or paged.

    packed_attention(query, key, value, ends, kv_lengths, block_table, sinks, *, scale, softcap, before, after)
        -> (out, lse)

    query (T, Hq, D)    out (T, Hq, Dv)    lse (T, Hq)
    packed keys: key (Tk, Hkv, D), value (Tk, Hkv, Dv)                      kv_lengths[b] is where sequence b's keys end
    paged keys:  key (N, P, Hkv, D), value (N, P, Hkv, Dv): N blocks of P   kv_lengths[b] is how many keys b has
                 block_table int32 (B, M): the blocks of each sequence

`ends[b]` is where the queries of sequence b end, so the last one is T. Row i of a sequence with Sq queries and Skv keys
is the position `i + Skv - Sq` among its keys (its queries are its newest tokens) and attends to the keys
`-before <= j - (i + Skv - Sq) <= after`; None leaves a side open. Causal is `after = 0`. Scores, softcap, sinks, empty
rows and dtypes are those of `sgl_npu::attention`, sequence by sequence. Inference only: there is no backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_npu.runtime.attention import compute_dtype, reference_attention
from sgl_npu.runtime.sizes import Condition, Size, guard

OP_NAME = "sgl_npu::packed_attention"

torch.library.define(
    OP_NAME,
    "(Tensor query, Tensor key, Tensor value, SymInt[] ends, SymInt[] kv_lengths, Tensor? block_table=None, "
    "Tensor? sinks=None, *, float scale=1.0, float softcap=0.0, int? before=None, int? after=None) "
    "-> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)

packed_attention = torch.ops.sgl_npu.packed_attention.default


def sequence_lengths(
    ends: Sequence[Size], kv_lengths: Sequence[Size], paged: bool
) -> list[tuple[tuple[Size, Size], tuple[Size, Size]]]:
    """Per sequence: (start, end) of its queries, and of its keys among the packed ones, or from 0 if they are paged."""
    rows = zip((0, *ends), ends, strict=False)
    keys = ((0, length) for length in kv_lengths) if paged else zip((0, *kv_lengths), kv_lengths, strict=False)
    return list(zip(rows, keys, strict=False))


def reference_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Sequence[Size],
    kv_lengths: Sequence[Size],
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    before: int | None = None,
    after: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula of this module in plain torch ops, one sequence after the other. Returns (out, lse)."""
    outs, lses = [], []
    for number, (rows, keys) in enumerate(sequence_lengths(ends, kv_lengths, block_table is not None)):
        shift = (keys[1] - keys[0]) - (rows[1] - rows[0])
        own = (query[rows[0] : rows[1]], *(_keys(x, block_table, number, keys) for x in (key, value)))
        one_query, one_key, one_value = (x.transpose(0, 1).unsqueeze(0) for x in own)  # (S, H, D) to (1, H, S, D)
        out, lse = reference_attention(
            one_query,
            one_key,
            one_value,
            sinks=sinks,
            scale=scale,
            softcap=softcap,
            lower=None if before is None else shift - before,
            upper=None if after is None else shift + after,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def _keys(x: Tensor, table: Tensor | None, number: int, span: tuple[Size, Size]) -> Tensor:
    """Keys or values of a sequence as (Skv, Hkv, D)."""
    if table is None:
        return x[span[0] : span[1]]
    blocks = (span[1] + x.size(1) - 1) // x.size(1)
    return x[table[number, :blocks].long()].flatten(0, 1)[: span[1]]


def check_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Sequence[Size],
    kv_lengths: Sequence[Size],
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    before: int | None = None,
    after: int | None = None,
) -> None:
    """Raise ValueError for shapes, dtypes and lengths outside the contract of the op."""
    _check_tensors(query, key, value, block_table, sinks)
    _check_lengths(query, key, ends, kv_lengths, block_table)
    if softcap < 0.0:
        raise ValueError(f"{OP_NAME}: softcap must be 0 (none) or positive, got {softcap}")
    for name, side in (("before", before), ("after", after)):
        if side is not None and side < 0:
            raise ValueError(f"{OP_NAME}: {name} must be None (open) or at least 0, got {side}")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, sinks: Tensor | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    rank, form = (3, "(tokens, Hkv, D)") if table is None else (4, "(blocks, block_size, Hkv, D) beside a block_table")
    if query.dim() != 3 or key.dim() != rank or value.dim() != rank:
        raise ValueError(f"{OP_NAME}: query must be (T, Hq, D), key and value {form}; got {shapes}")
    rules: tuple[tuple[Condition, str], ...] = (
        (query.size(-1) != key.size(-1), "query and key head sizes differ"),
        *((a != b, "key and value differ") for a, b in zip(key.shape[:-1], value.shape[:-1], strict=True)),
    )
    for broken, rule in rules:
        if guard(broken):
            raise ValueError(f"{OP_NAME}: {rule}: {shapes}")
    if guard(key.size(-2) == 0) or guard(query.size(1) % key.size(-2) != 0):
        raise ValueError(f"{OP_NAME}: query heads must be a multiple of key heads: {shapes}")
    if not (query.dtype == key.dtype == value.dtype) or not query.dtype.is_floating_point:
        raise ValueError(
            f"{OP_NAME}: query, key and value must share a floating dtype, "
            f"got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if table is not None and (table.dtype != torch.int32 or table.dim() != 2):
        raise ValueError(
            f"{OP_NAME}: block_table must be int32 (sequences, blocks), got {table.dtype} {tuple(table.shape)}"
        )
    if sinks is not None and (sinks.dim() != 1 or guard(sinks.size(0) != query.size(1))):
        raise ValueError(f"{OP_NAME}: sinks must be ({query.size(1)},), one per query head, got {tuple(sinks.shape)}")


def _check_lengths(
    query: Tensor, key: Tensor, ends: Sequence[Size], kv_lengths: Sequence[Size], table: Tensor | None
) -> None:
    if not ends or len(ends) != len(kv_lengths):
        raise ValueError(
            f"{OP_NAME}: both lists of lengths must have an entry per sequence, got {len(ends)} and {len(kv_lengths)}"
        )
    _check_ends("actual_seq_lengths", ends, query.size(0), "query tokens")
    if table is None:
        _check_ends("actual_seq_lengths_kv", kv_lengths, key.size(0), "key tokens")
        return
    if guard(table.size(0) != len(ends)):
        raise ValueError(f"{OP_NAME}: block_table has {table.size(0)} rows for {len(ends)} sequences")
    capacity = table.size(1) * key.size(1)
    for length in kv_lengths:
        if guard(length < 0) or guard(length > capacity):
            raise ValueError(
                f"{OP_NAME}: actual_seq_lengths_kv has {length}; beside a block_table it lists the number of keys of "
                f"each sequence, at most {table.size(1)} blocks of {key.size(1)}"
            )


def _check_ends(name: str, ends: Sequence[Size], total: Size, what: str) -> None:
    for start, end in zip((0, *ends), ends, strict=False):
        if guard(end < start):
            raise ValueError(f"{OP_NAME}: {name} goes down from {start} to {end}; it lists where each sequence ends")
    if guard(ends[-1] != total):
        raise ValueError(
            f"{OP_NAME}: {name} ends at {ends[-1]}, not at the {total} {what}; it lists where each sequence ends "
            "(cumulative lengths, without a 0 in front)"
        )


def _split(options: dict) -> dict:
    return {name: options[name] for name in ("softcap", "before", "after") if name in options}


@torch.library.impl(OP_NAME, "CompositeExplicitAutograd")
def _kernel(query, key, value, ends, kv_lengths, block_table=None, sinks=None, **options):
    check_packed(query, key, value, ends, kv_lengths, block_table, sinks, **_split(options))
    out, lse = reference_packed_attention(query, key, value, ends, kv_lengths, block_table, sinks, **options)
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake(OP_NAME)
def _fake(query, key, value, ends, kv_lengths, block_table=None, sinks=None, **options):
    check_packed(query, key, value, ends, kv_lengths, block_table, sinks, **_split(options))
    tokens, heads, _ = query.shape
    out = query.new_empty((tokens, heads, value.size(-1)))
    return out, query.new_empty((tokens, heads), dtype=compute_dtype(query.dtype))


def _no_backward(ctx, *gradients):
    raise RuntimeError(
        f"{OP_NAME}: it is for inference and has no backward; call it under torch.no_grad(), or pad the sequences and "
        "use scaled_dot_product_attention to train"
    )


torch.library.register_autograd(OP_NAME, _no_backward)
