"""Ring attention: keys and values go round the blocks in one message, and every rank attends to each as it passes.

    hop 0      rank r attends to its own keys
    hop t      to those of rank r - t, whose next shift has started before
    R - 1 shifts in all; fewer where a window keeps none of the keys of the later hops

Every rank runs the same ops. What depends on the rank is chosen by index_select and where:

    zigzag causal     hop t, rank r holds blocks lo = r and hi = 2R-1-r, the source s = r - t mod R likewise:
                      (q_hi, k_lo) is full for all; the other half of the work is (q_lo, k_lo) if s < r, else
                      (q_hi, k_hi), full too. Both pairs are one call of twice the batch, without a mask.
    full              every hop is full; keys that are padding are masked
    band              rows in order: hop t is the band moved by t chunks. Ranks for which the hop goes past the end of
                      the sequence ignore it by an lse of -inf. Bands that reach both ways are fed from both sides.
    any other         the hop's rows and columns of the mask, by position
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, with_sinks
from sgl_npu.lowering.sequence.block import attend, attend_to, merged, message_order, pack, result, unpack
from sgl_npu.lowering.sequence.merge import Part, joined
from sgl_npu.lowering.sequence.positions import (
    at_positions,
    global_band,
    has_no_tensors,
    is_causal,
    padding_of,
    same_rows,
)
from sgl_npu.runtime.collectives import ring_shift, wait
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import guard, known

Emit = Callable[[AttentionCall, SequenceLayout, SequenceLayout, Axis, Tensor], Part]


def ring(
    call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh, ranks: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Ring attention over the blocks of layouts that have no ulysses axis."""
    call = global_band(call, layout, kv_layout)
    emit = _schedule(call, layout, kv_layout)
    inner = with_sinks(lambda call: result(call, emit(call, layout, kv_layout, mesh.blocks, ranks)))
    return inner(call)


def hops(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout) -> int:
    """How many shifts the ring makes."""
    window = reach(call, layout, kv_layout)
    return layout.blocks - 1 if window is None else sum(window)


def reach(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout) -> tuple[int, int] | None:
    """How many chunks before and after its own the keys of a window come from; None where all keys go round."""
    call = global_band(call, layout, kv_layout)
    return _reach(call, layout) if _schedule(call, layout, kv_layout) is _banded else None


def _schedule(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout) -> Emit:
    if layout.zigzag and is_causal(call, layout, kv_layout):
        return _zigzag_causal
    if not has_no_tensors(call):
        return _by_position
    if call.lower is None and call.upper is None:
        return _full
    in_order = not layout.zigzag and len(layout.segments) == 1 and same_rows(layout, kv_layout)
    return _banded if in_order and sum(_reach(call, layout)) < layout.blocks else _by_position


def _pass_round(
    call: AttentionCall, axis: Axis, count: int, step: int = 1
) -> tuple[tuple[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]:
    """The rank's own keys and values, and those of each hop after the first.

    The first shift starts at once, the next ones a hop ahead.
    """
    own = call.key, call.value
    if count == 0:
        return own, iter(())
    rows = [message_order(call, x) for x in own]
    message = pack(rows)

    def keys_and_values(message: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (message_order(call, x) for x in unpack(message, rows))
        return key, value

    def arrivals(pending: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for hop in range(1, count + 1):
            message = wait(pending)
            if hop < count:
                pending = ring_shift(message, axis, step)
            yield keys_and_values(message)

    # On a CPU the copies are in the better order.
    return keys_and_values(message) if call.platform == "cpu" else own, arrivals(ring_shift(message, axis, step))


def _source(ranks: Tensor, hop: int, size: int) -> Tensor:
    """The index of the rank whose keys arrive at that hop."""
    return torch.stack([(ranks[0] - hop) % size, ranks[1]])


def _zigzag_causal(
    call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, axis: Axis, ranks: Tensor
) -> Part:
    own_keys, arrivals = _pass_round(call, axis, axis.size - 1)
    own = attend_to(call, call.query, *own_keys, upper=0)
    chunk = layout.chunk()
    low, high = (Part(own.out.narrow(2, at, chunk), own.lse.narrow(2, at, chunk)) for at in (0, chunk))
    query = _by_half(call.query)
    for hop, (key, value) in enumerate(arrivals, 1):
        is_low = ranks[0] >= hop
        half = 1 - is_low.to(torch.int64)
        queries = query.index_select(0, torch.stack([torch.ones_like(half), half]))
        halves = torch.stack([torch.zeros_like(half), half])
        keys, values = (_by_half(x).index_select(0, halves) for x in (key, value))
        part = attend_to(call, queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1))
        batch = call.query.size(0)
        out, lse = (x.unflatten(0, (2, batch)) for x in (part.out, part.lse))
        either = Part(out[1], lse[1])
        low = merged(call, [low, either.where(is_low)])
        high = merged(call, [high, Part(out[0], lse[0]), either.where(~is_low)])
    return joined([low, high])


def _by_half(x: Tensor) -> Tensor:
    """(B, H, 2 h, D) as (2, B, H, h, D)."""
    return x.unflatten(2, (2, x.size(2) // 2)).permute(2, 0, 1, 3, 4)


def _full(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, axis: Axis, ranks: Tensor) -> Part:
    own, arrivals = _pass_round(call, axis, axis.size - 1)
    total = attend_to(call, call.query, *own, _kept(kv_layout, ranks))
    for hop, (key, value) in enumerate(arrivals, 1):
        kept = _kept(kv_layout, _source(ranks, hop, axis.size))
        total = merged(call, [total, attend_to(call, call.query, key, value, kept)])
    return total


def _kept(layout: SequenceLayout, ranks: Tensor) -> Tensor | None:
    """Bool (1, 1, 1, local_length): the rows of a rank that are no padding; None if all ranks' are none."""
    padding = padding_of(layout, ranks)
    return None if padding is None else ~padding[None, None, None]


def _is_outside(call: AttentionCall, layout: SequenceLayout, offset: int) -> bool:
    """Whether the band keeps no key of the chunk that is `offset` chunks after the query's."""
    chunk = layout.chunk()
    first, last = (offset - 1) * chunk + 1, (offset + 1) * chunk - 1
    below = call.lower is not None and guard(call.lower > last)
    return below or (call.upper is not None and guard(call.upper < first))


def _reach(call: AttentionCall, layout: SequenceLayout) -> tuple[int, int]:
    """How many chunks before and after its own the band of a rank reaches."""
    before, after = (
        max((far for far in range(1, layout.blocks) if not _is_outside(call, layout, side * far)), default=0)
        for side in (-1, 1)
    )
    return before, after


def _banded(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, axis: Axis, ranks: Tensor) -> Part:
    before, after = _reach(call, layout)
    sides = [(-1, _pass_round(call, axis, before)[1]), (1, _pass_round(call, axis, after, -1)[1])]
    total = _banded_hop(call, layout, ranks, 0, call.key, call.value)
    for side, arrivals in sides:
        for far, (key, value) in enumerate(arrivals, 1):
            if _is_outside(call, layout, side * far):
                continue
            other = ranks[0] + side * far
            part = _banded_hop(call, layout, ranks, side * far, key, value)
            total = merged(call, [total, part.where((other >= 0) & (other < axis.size))])
    return merged(call, [total])


def _banded_hop(
    call: AttentionCall, layout: SequenceLayout, ranks: Tensor, offset: int, key: Tensor, value: Tensor
) -> Part:
    """Attention to the chunk that is `offset` after the query's."""
    lower, upper = (None if side is None else side - offset * layout.chunk() for side in (call.lower, call.upper))
    mask = None
    if call.upper is None or not known(call.upper <= 0):  # otherwise only padding sees padding
        mask = _kept(layout, torch.stack([ranks[0] + offset, ranks[1]]))
    block = replace(call, key=key, value=value, mask=mask, sinks=None)
    return attend(block.with_band(lower, upper))


def _by_position(
    call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, axis: Axis, ranks: Tensor
) -> Part:
    own, arrivals = _pass_round(call, axis, axis.size - 1)
    rows = layout.positions(ranks)
    total = None
    for hop in range(axis.size):
        key, value = own if hop == 0 else next(arrivals)
        source = _source(ranks, hop, axis.size) if hop else ranks
        block = replace(call, key=key, value=value, sinks=None)
        part = attend(at_positions(block, rows, kv_layout.positions(source), padding_of(kv_layout, source)))
        total = merged(call, [part] if total is None else [total, part])
    assert total is not None
    return total
