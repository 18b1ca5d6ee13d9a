"""Ulysses: the ranks exchange heads for rows, each attends to all rows with its share of the heads, and back.

    before   (B, H, L, D) on each of U ranks
    between  (B, ceil(H / U), U L, D)
    after    (B, H, L, D)

One all-to-all carries query, key and value, a second one the output. Query heads that the ranks do not divide are
filled up with zeros. Each rank gets the key heads that its query heads read, and no others if that is the same
number on every rank:

    whole groups on each rank                       its part of the key heads
    the query heads of a rank all within a group    one key head, sent to several ranks
    otherwise                                       key heads repeated, one per query head

What runs between the exchanges is plain attention, or a scheme over the axis blocks (the hybrid).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, four_dims, head_counts
from sgl_npu.lowering.sequence.block import attend, result
from sgl_npu.lowering.sequence.block_layout import (
    block_layout,
    block_ranks,
    from_blocks,
    to_blocks,
    with_padding,
    without_padding,
)
from sgl_npu.runtime.collectives import all_to_all, wait
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import guard, known

Scheme = Callable[[AttentionCall, SequenceLayout, SequenceLayout, SequenceMesh, Tensor], tuple[Tensor, "Tensor | None"]]


@dataclass(frozen=True)
class HeadShares:
    """How the heads are shared: `query` and `key` per rank, after each key head is repeated `repeats` times."""

    query: int
    key: int
    repeats: int


def head_shares(query_heads: int, key_heads: int, ranks: int) -> HeadShares:
    """The shares of the table above, from the head counts of the local tensors."""
    share, group = -(-query_heads // ranks), query_heads // key_heads
    if share % group == 0:
        return HeadShares(share, share // group, 1)
    if group % share == 0:
        return HeadShares(share, 1, group // share)
    return HeadShares(share, share, group)


def ulysses(
    call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh, ranks: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Attention to the whole sequence with a share of the heads, on a mesh of one block."""
    return over_heads(_whole_rows)(call, layout, kv_layout, mesh, ranks)


def over_heads(inner: Scheme) -> Scheme:
    """`inner`, a scheme over blocks, with the heads shared among the ranks of the axis ulysses."""

    def scheme(
        call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh, ranks: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        blocks_mesh = SequenceMesh(mesh.blocks, Axis(1, mesh.ulysses.group), mesh.blocks)
        layouts = block_layout(layout), block_layout(kv_layout)
        if mesh.ulysses.size == 1:
            return inner(call, *layouts, blocks_mesh, block_ranks(ranks))
        heads = head_counts(call)
        shares = head_shares(*heads, mesh.ulysses.size)
        shared = _share_heads(call, shares, mesh.ulysses.size)
        query, key, value = _to_heads([shared.query, shared.key, shared.value], mesh.ulysses)
        query, key, value = to_blocks(query, layout), to_blocks(key, kv_layout), to_blocks(value, kv_layout)
        local = _own_heads(call, heads[0], shares.query, ranks[1:2])
        local = replace(local, query=query, key=key, value=value)
        out, lse = inner(local, *layouts, blocks_mesh, block_ranks(ranks))
        returned = [_to_rows(from_blocks(out, layout), mesh.ulysses)]
        if lse is not None:
            returned.append(_to_rows(from_blocks(lse.unsqueeze(-1), layout), mesh.ulysses))
        out, *rest = (_from_heads(wait(x), heads[0]) for x in returned)
        return out, rest[0].squeeze(-1).contiguous() if rest else None

    return scheme


def _whole_rows(
    call: AttentionCall, layout, kv_layout, mesh: SequenceMesh, ranks: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Plain attention: a layout of one block has all rows, in order but for the padding."""
    assert mesh.blocks.size == 1
    rows = replace(
        call,
        query=without_padding(call.query, layout),
        key=without_padding(call.key, kv_layout),
        value=without_padding(call.value, kv_layout),
    )
    out, lse = result(call, attend(rows))
    return with_padding(out, layout), None if lse is None else with_padding(lse, layout)


def _share_heads(call: AttentionCall, shares: HeadShares, ranks: int) -> AttentionCall:
    """The call with as many heads as the ranks share out."""
    key, value = (_fill_heads(_repeat_heads(x, shares.repeats), shares.key * ranks) for x in (call.key, call.value))
    return replace(call, query=_fill_heads(call.query, shares.query * ranks), key=key, value=value)


def _repeat_heads(x: Tensor, repeats: int) -> Tensor:
    if repeats == 1:
        return x
    batch, heads, length, dim = x.shape
    return x.unsqueeze(2).expand(batch, heads, repeats, length, dim).flatten(1, 2)


def _fill_heads(x: Tensor, heads: int) -> Tensor:
    """`x` with heads of zeros at the end."""
    if known(x.size(1) == heads):
        return x
    return torch.cat([x, x.new_zeros((x.size(0), heads - x.size(1), *x.shape[2:]))], 1)


def _own_heads(call: AttentionCall, heads: int, share: int, rank: Tensor) -> AttentionCall:
    """The call with the rank's heads of mask, bias and sinks. Heads that fill up repeat the last one's."""
    tensors = {"mask": call.mask, "bias": call.bias, "sinks": call.sinks}
    own: dict[str, Tensor | None] = {}
    for name, x in tensors.items():
        dim = 0 if name == "sinks" else 1
        x = x if x is None or dim == 0 else four_dims(x)
        if x is not None and (dim == 0 or not guard(x.size(1) == 1)):
            index = (rank * share + torch.arange(share, device=rank.device)).clamp(max=heads - 1)
            x = x.index_select(dim, index)
        own[name] = x
    return replace(call, mask=own["mask"], bias=own["bias"], sinks=own["sinks"])


def _to_heads(tensors: list[Tensor], axis: Axis) -> list[Tensor]:
    """(B, U h, L, D) each, as (B, h, U L, D) with the rows of all ranks and a share of the heads, in one exchange."""
    size = axis.size
    parts = [x.unflatten(1, (size, x.size(1) // size)).permute(1, 3, 0, 2, 4) for x in tensors]
    sizes = [part.shape for part in parts]
    if all(known(part.size(1) == parts[0].size(1)) for part in parts):
        # Row by row: what arrives is already in the order of the rows, and each part is a view of it.
        message = wait(all_to_all(torch.cat([part.flatten(3) for part in parts], 3), axis)).flatten(0, 1)
        arrived = message.split([shape[3] * shape[4] for shape in sizes], 2)
        return [
            x.unflatten(2, (shape[3], shape[4])).permute(1, 2, 0, 3) for x, shape in zip(arrived, sizes, strict=True)
        ]
    message = wait(all_to_all(torch.cat([part.flatten(1) for part in parts], 1), axis))
    arrived = message.split([math.prod(shape[1:]) for shape in sizes], 1)
    return [
        x.unflatten(1, shape[1:]).permute(2, 3, 0, 1, 4).flatten(2, 3) for x, shape in zip(arrived, sizes, strict=True)
    ]


def _to_rows(x: Tensor, axis: Axis) -> Tensor:
    """Start to send each rank its rows of (B, h, U L, D); (U, L, B, h, D) is to arrive."""
    length = x.size(2) // axis.size
    return all_to_all(x.unflatten(2, (axis.size, length)).permute(2, 3, 0, 1, 4), axis)


def _from_heads(x: Tensor, heads: int) -> Tensor:
    """(U, L, B, h, D), which has arrived, as (B, H, L, D) without the heads that filled up."""
    rows = x.permute(2, 1, 0, 3, 4).flatten(2, 3)
    return (rows if known(rows.size(2) == heads) else rows[:, :, :heads]).transpose(1, 2)
