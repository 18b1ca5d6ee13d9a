"""Which schemes there are, what each refuses, and what each sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, head_counts
from sgl_npu.lowering.sequence import kv_gather, ring, ulysses
from sgl_npu.lowering.sequence.block_layout import block_layout
from sgl_npu.runtime.attention import compute_dtype
from sgl_npu.runtime.sequence import SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import Size

Judge = Callable[[AttentionCall, SequenceLayout, SequenceLayout, SequenceMesh], "str | None"]
Count = Callable[[AttentionCall, SequenceLayout, SequenceLayout, SequenceMesh], Size]


@dataclass(frozen=True)
class SequenceScheme:
    """A row of the table.

    `refuse` gives None or the rule that the call breaks on this mesh; `emit` is traced in place of the attention;
    `bytes` is what one rank sends for one call, and `messages` says how many messages that is. For readers there are
    `collectives`, the same for any degrees, and `formula`, the bytes in elements where everything divides: S rows on
    P = R x U ranks, of R blocks and U for ulysses.
    """

    name: str
    refuse: Judge
    emit: ulysses.Scheme
    bytes: Count
    messages: Callable[[AttentionCall, SequenceLayout, SequenceLayout, SequenceMesh], str]
    collectives: str
    formula: str


def _refuse_heads(call: AttentionCall, mesh: SequenceMesh) -> str | None:
    heads, ranks = head_counts(call)[0], mesh.ulysses.size
    if ranks <= heads:
        return None
    return (
        f"ulysses = {ranks} is more than the {heads} query heads: some ranks would have none; use a ring for the rest"
    )


def _refuse_ulysses(call: AttentionCall, layout, kv_layout, mesh: SequenceMesh) -> str | None:
    if mesh.blocks.size > 1:
        return f"the mesh has {mesh.blocks.size} blocks: ulysses alone serves one; use ring or kv_gather over blocks"
    return _refuse_heads(call, mesh)


def _refuse_blocks(call: AttentionCall, layout, kv_layout, mesh: SequenceMesh) -> str | None:
    if mesh.blocks.size == 1:
        return "the mesh has one block: there is nothing to pass on; use ulysses"
    return _refuse_heads(call, mesh)


def _exchanged(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh) -> Size:
    """Bytes of the two all-to-alls over the axis ulysses."""
    ranks = mesh.ulysses.size
    if ranks == 1:
        return 0
    shares = ulysses.head_shares(*head_counts(call), ranks)
    batch, size, value_size = call.query.size(0), call.query.size(3), call.value.size(3)
    rows = layout.local_length * shares.query * (size + value_size)
    rows = rows + kv_layout.local_length * shares.key * (size + value_size)
    sent = batch * rows * call.query.element_size()
    if call.needs_lse:
        sent = sent + batch * layout.local_length * shares.query * compute_dtype(call.query.dtype).itemsize
    return sent * (ranks - 1)


def _keys_of_block(call: AttentionCall, kv_layout: SequenceLayout, mesh: SequenceMesh) -> Size:
    """Bytes of the keys and values that a rank has when it passes them on."""
    ranks = mesh.ulysses.size
    heads = call.key.size(1) if ranks == 1 else ulysses.head_shares(*head_counts(call), ranks).key
    rows = call.key.size(0) * heads * kv_layout.local_length * ranks
    return rows * (call.key.size(3) + call.value.size(3)) * call.key.element_size()


def _ring_bytes(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh) -> Size:
    count = ring.hops(call, block_layout(layout), block_layout(kv_layout))
    return _exchanged(call, layout, kv_layout, mesh) + count * _keys_of_block(call, kv_layout, mesh)


def _gather_bytes(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh) -> Size:
    count = mesh.blocks.size - 1
    return _exchanged(call, layout, kv_layout, mesh) + count * _keys_of_block(call, kv_layout, mesh)


def _gather(
    call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh, ranks: Tensor
) -> tuple[Tensor, Tensor | None]:
    return ulysses.over_heads(kv_gather.kv_gather)(call, layout, kv_layout, mesh, ranks)


def _ring(
    call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh, ranks: Tensor
) -> tuple[Tensor, Tensor | None]:
    return ulysses.over_heads(ring.ring)(call, layout, kv_layout, mesh, ranks)


def _exchanges(call: AttentionCall, layout, kv_layout, mesh: SequenceMesh) -> str:
    return "2 all-to-all"


def _shifts(call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh) -> str:
    count = ring.hops(call, block_layout(layout), block_layout(kv_layout))
    return f"{count} shift{'' if count == 1 else 's'}" + _beside(mesh)


def _gathers(call: AttentionCall, layout, kv_layout, mesh: SequenceMesh) -> str:
    return "1 all-gather" + _beside(mesh)


def _beside(mesh: SequenceMesh) -> str:
    return ", 2 all-to-all" if mesh.ulysses.size > 1 else ""


_HYBRID = "2 all-to-all more where ulysses > 1"
_HEADS_SENT = "2 * (Hq + Hkv) * D * S/P * (U - 1)/U"
_KEYS_SENT = "2 * Hkv * D * S/P * (R - 1)"
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        SequenceScheme(
            "ulysses", _refuse_ulysses, ulysses.ulysses, _exchanged, _exchanges, "2 all-to-all", _HEADS_SENT
        ),
        SequenceScheme(
            "ring",
            _refuse_blocks,
            _ring,
            _ring_bytes,
            _shifts,
            f"ring - 1 shifts, fewer for a window; {_HYBRID}",
            f"{_KEYS_SENT} + {_HEADS_SENT}",
        ),
        SequenceScheme(
            "kv_gather",
            _refuse_blocks,
            _gather,
            _gather_bytes,
            _gathers,
            f"1 all-gather; {_HYBRID}",
            f"{_KEYS_SENT} + {_HEADS_SENT}",
        ),
    )
}
