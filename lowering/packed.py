"""One attention over packed sequences, what a kernel row for it is, and the rows that every platform has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sgl_npu.runtime.packed_attention import reference_packed_attention, sequence_lengths
from sgl_npu.runtime.sizes import Size, specialise


@dataclass(frozen=True)
class PackedCall:
    """The arguments of one `sgl_npu::packed_attention` (fake tensors when a row judges it, traced when it emits it)."""

    query: Tensor
    key: Tensor
    value: Tensor
    ends: Sequence[Size]
    kv_lengths: Sequence[Size]
    block_table: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    before: int | None = None
    after: int | None = None
    needs_lse: bool = False

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def lengths(self) -> list[tuple[Size, Size]]:
        """(query rows, keys) of each sequence."""
        spans = sequence_lengths(self.ends, self.kv_lengths, self.paged)
        return [(rows[1] - rows[0], keys[1] - keys[0]) for rows, keys in spans]

    def head_counts(self) -> tuple[int, int]:
        """Heads of the query and of the key, for op arguments of type int."""
        return specialise(self.query.size(1)), specialise(self.key.size(-2))


@dataclass(frozen=True)
class PackedKernel:
    """A row of a platform's table for packed attention; the fields are those of `lowering.kernel.Kernel`.

    `emit` None leaves the op as it is.
    """

    name: str
    op: str
    refuse: Callable[[PackedCall], str | None]
    emit: Callable[[PackedCall], tuple[Tensor, Tensor | None]] | None
    applies: Callable[[PackedCall], bool] = lambda call: True


def _emit_reference(call: PackedCall) -> tuple[Tensor, Tensor | None]:
    out, lse = reference_packed_attention(
        call.query,
        call.key,
        call.value,
        call.ends,
        call.kv_lengths,
        call.block_table,
        call.sinks,
        scale=call.scale,
        softcap=call.softcap,
        before=call.before,
        after=call.after,
    )
    return out, lse if call.needs_lse else None


PACKED_OP = PackedKernel("packed_reference", "sgl_npu.packed_attention", lambda call: None, None)
PACKED_REFERENCE = PackedKernel("packed_reference", "aten (decomposed)", lambda call: None, _emit_reference)
