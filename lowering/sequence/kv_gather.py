"""KV-gather: every rank gathers all keys and values in one message, then attends to them on its own.

    zigzag causal     rank r holds the query blocks lo = r and hi = 2R-1-r. With the rank known when the graph runs
                      (`ring_rank`) each half is one bottom-right causal call on the keys up to its end.
                      Without, the work is cut so that every rank runs the same calls without a mask:
                        A  both halves on the rank's own keys, causal: what lies in between is in order too
                        B  q_hi on the lo blocks of the R - 1 other ranks, full
                        C  R - 1 pairs, full, as one call: with each other rank s, q_lo on its lo block if s < r,
                           else q_hi on its hi block
    rows in order     with `ring_rank`, one call with the band moved to the rank's rows
    causal otherwise  each run of rows on its own keys, causal, and on those before it by a mask of keys, merged
    any other         the rows of band and mask at the positions of the queries

Queries that are sharded over keys that every rank has, as in cross attention, are served by `gathered_attention` too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, with_sinks
from sgl_npu.lowering.sequence.block import attend, attend_to, merged, message_order, pack, result
from sgl_npu.lowering.sequence.merge import Part, joined
from sgl_npu.lowering.sequence.positions import at_positions, has_no_tensors, is_causal, rows_of
from sgl_npu.runtime.collectives import all_gather, wait
from sgl_npu.runtime.sequence import SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import Size, guard, known


def kv_gather(
    call: AttentionCall,
    layout: SequenceLayout,
    kv_layout: SequenceLayout,
    mesh: SequenceMesh,
    ranks: Tensor,
    ring_rank: Size | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of local queries to the keys of all ranks."""
    if ring_rank is None and layout.zigzag and is_causal(_open_band(call, layout, kv_layout.length), layout, kv_layout):
        return with_sinks(lambda call: result(call, _gathered_balanced(call, layout, mesh, ranks)))(call)
    key, value = gather_kv(call.key, call.value, kv_layout, mesh)
    return gathered_attention(replace(call, key=key, value=value), layout, ranks, ring_rank)


def gather_kv(key: Tensor, value: Tensor, kv_layout: SequenceLayout, mesh: SequenceMesh) -> tuple[Tensor, Tensor]:
    """The keys and values of the whole sequence, in its order, from those of every rank of the mesh: one all-gather."""
    rows = torch.cat([x.permute(2, 0, 1, 3) for x in (key, value)], 3)
    gathered = wait(all_gather(rows, mesh.whole)).permute(1, 2, 0, 3)
    index = None if kv_layout.is_rank_major else kv_layout.gathered_index(key.device)
    both = gathered.split([key.size(3), value.size(3)], 3)
    full_key, full_value = (x.contiguous() if index is None else x.index_select(2, index) for x in both)
    return full_key, full_value


def gathered_attention(
    call: AttentionCall, layout: SequenceLayout, ranks: Tensor, ring_rank: Size | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention of local queries to all keys, which are in the call. No communication.

    `ring_rank`: the rank's index on the axis blocks, where it is a number when this runs.
    """
    call = _open_band(call, layout, call.key.size(2))
    if call.lower is None and call.upper is None:
        return _one_call(_with_rows(call, layout, ranks))
    # With ulysses > 1 a rank's rows are pieces of its blocks.
    whole_blocks = layout.zigzag and layout.ulysses == 1
    if whole_blocks and call.lower is None and has_no_tensors(call) and call.upper is not None:
        if ring_rank is not None:
            return _prefixes(call, layout, ring_rank)
        if known(call.upper == 0) and known(call.key.size(2) == layout.length):
            return with_sinks(lambda call: result(call, _whole_balanced(call, layout, ranks)))(call)
    if ring_rank is not None and layout.ulysses == 1 and len(layout.segments) == 1 and not layout.zigzag:
        start = ring_rank * layout.chunk()
        band = (None if side is None else side + start for side in (call.lower, call.upper))
        return _one_call(_with_rows(call, layout, ranks).with_band(*band))
    if is_causal(call, layout, layout) and known(call.key.size(2) == layout.length):
        return with_sinks(lambda call: result(call, _runs(call, layout, ranks)))(call)
    return _one_call(at_positions(call, layout.positions(ranks)))


def _runs(call: AttentionCall, layout: SequenceLayout, ranks: Tensor) -> Part:
    """Each run of consecutive rows on its own keys, causal, and on all keys before it: no mask has rows."""
    chunk, keys = layout.chunk(), torch.arange(layout.length, device=ranks.device)
    parts = []
    for number, start in enumerate(layout.starts(ranks)):
        query = call.query.narrow(2, number * chunk, chunk)
        own = (start + torch.arange(chunk, device=ranks.device)).clamp(max=layout.length - 1)
        own_key, own_value = (x.index_select(2, own) for x in (call.key, call.value))
        earlier = replace(call, query=query, mask=(keys < start)[None, None, None]).with_band(None, None)
        parts.append(merged(call, [attend_to(call, query, own_key, own_value, upper=0), attend(earlier)]))
    return joined(parts)


def _open_band(call: AttentionCall, layout: SequenceLayout, keys: Size) -> AttentionCall:
    lower, upper = call.lower, call.upper
    if upper is not None and known(upper >= keys - 1):
        upper = None
    if lower is not None and known(lower <= 1 - layout.length):
        lower = None
    return call.with_band(lower, upper)


def _one_call(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    return result(call, attend(call))


def _with_rows(call: AttentionCall, layout: SequenceLayout, ranks: Tensor) -> AttentionCall:
    """The call with the rows of its mask and bias that are this rank's, and its band as it is."""
    tensors = [x for x in (call.mask, call.bias) if x is not None]
    if all(x.dim() < 2 or guard(x.size(-2) == 1) for x in tensors):
        return call
    rows = layout.positions(ranks)
    return replace(call, mask=rows_of(call.mask, rows, 2), bias=rows_of(call.bias, rows, 2))


def _prefixes(call: AttentionCall, layout: SequenceLayout, ring_rank: Size) -> tuple[Tensor, Tensor | None]:
    """Each half of the queries on the keys up to its end, causal from the bottom right."""
    assert call.upper is not None
    chunk = layout.chunk()
    parts = []
    for half, block in enumerate((ring_rank, 2 * layout.blocks - 1 - ring_rank)):
        before = block * chunk + call.upper
        key, value = (x[:, :, : before + chunk] for x in (call.key, call.value))
        query = call.query.narrow(2, half * chunk, chunk)
        parts.append(attend(replace(call, query=query, key=key, value=value).with_band(None, before)))
    return result(call, joined(parts))


@dataclass(frozen=True)
class _Blocks:
    """All 2 R blocks of keys and values, (2 R, B, Hkv, h, D) each, and where those of given ranks are among them."""

    key: Tensor
    value: Tensor
    low: Callable[[Tensor], Tensor]
    high: Callable[[Tensor], Tensor]

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.key.index_select(0, index), self.value.index_select(0, index)


def _gathered_balanced(call: AttentionCall, layout: SequenceLayout, mesh: SequenceMesh, ranks: Tensor) -> Part:
    """The calls of the module's table, on blocks that are left where the gather puts them."""
    halves = [x.chunk(2, 2) for x in (call.key, call.value)]
    pieces = [message_order(call, x[half]) for half in range(2) for x in halves]
    sizes = [x.numel() for x in pieces[:2]]
    both = wait(all_gather(pack(pieces), mesh.whole)).view(2 * layout.blocks, sum(sizes)).split(sizes, 1)
    gathered = (x.unflatten(1, like.shape) for x, like in zip(both, pieces[:2], strict=True))
    key, value = (message_order(call, x, 2) for x in gathered)
    blocks = _Blocks(key, value, lambda rank: 2 * rank, lambda rank: 2 * rank + 1)
    return _balanced(call, call.key, call.value, blocks, layout, ranks)


def _whole_balanced(call: AttentionCall, layout: SequenceLayout, ranks: Tensor) -> Part:
    """The same for keys in the order of the sequence."""
    count = 2 * layout.blocks
    # Padded keys are behind the last query that is none.
    key, value = (_by_block(_lengthened(x, count * layout.chunk()), count) for x in (call.key, call.value))
    blocks = _Blocks(key, value, lambda rank: rank, lambda rank: count - 1 - rank)
    own = blocks.at(torch.stack([blocks.low(ranks[0]), blocks.high(ranks[0])]))
    own_key, own_value = (_in_a_row(x) for x in own)
    return _balanced(call, own_key, own_value, blocks, layout, ranks)


def _balanced(
    call: AttentionCall, key: Tensor, value: Tensor, blocks: _Blocks, layout: SequenceLayout, ranks: Tensor
) -> Part:
    """The calls A, B and C of the module's table, merged. `key` and `value` are the rank's own."""
    chunk, count = layout.chunk(), layout.blocks - 1
    if count == 0:
        return attend_to(call, call.query, key, value, upper=0)
    others = (ranks[:1] + torch.arange(1, count + 1, device=ranks.device)) % layout.blocks
    first_key, first_value = (_in_a_row(x) for x in blocks.at(blocks.low(others)))
    high_first = attend_to(call, call.query.narrow(2, chunk, chunk), first_key, first_value)
    own = attend_to(call, call.query, key, value, upper=0)

    is_low = others < ranks[:1]
    query = _by_block(call.query, 2).index_select(0, torch.where(is_low, 0, 1))
    paired = blocks.at(torch.where(is_low, blocks.low(others), blocks.high(others)))
    query, paired_key, paired_value = (x.flatten(0, 1) for x in (query, *paired))
    pairs = _split(attend_to(call, query, paired_key, paired_value), count)
    low = merged(call, [_half(own, 0, chunk), *(part.where(is_low[number]) for number, part in enumerate(pairs))])
    others_high = (part.where(~is_low[number]) for number, part in enumerate(pairs))
    high = merged(call, [_half(own, chunk, chunk), high_first, *others_high])
    return joined([low, high])


def _half(part: Part, start: Size, length: Size) -> Part:
    return Part(part.out.narrow(2, start, length), part.lse.narrow(2, start, length))


def _lengthened(x: Tensor, length: Size) -> Tensor:
    return x if known(x.size(2) == length) else F.pad(x, (0, 0, 0, length - x.size(2)))


def _by_block(x: Tensor, blocks: int) -> Tensor:
    """(B, H, blocks h, D) as (blocks, B, H, h, D)."""
    return x.unflatten(2, (blocks, x.size(2) // blocks)).permute(2, 0, 1, 3, 4)


def _in_a_row(x: Tensor) -> Tensor:
    """(n, B, H, h, D) as (B, H, n h, D)."""
    return x.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _split(part: Part, count: int) -> list[Part]:
    out, lse = (x.unflatten(0, (count, x.size(0) // count)) for x in (part.out, part.lse))
    return [Part(*both) for both in zip(out.unbind(0), lse.unbind(0), strict=True)]
