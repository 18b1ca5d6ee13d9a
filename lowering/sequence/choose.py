"""Which scheme serves an attention: the first the user allows that sends the fewest bytes.

    ulysses     2 exchanges of heads, (2 Hq + 2 Hkv) D S/P (P-1)/P elements per rank: falls with the number of ranks
    ring        2 Hkv D S/P (P-1): less than ulysses where many query heads share few key heads
    kv_gather   as many as the ring in one message, and none beyond it where a cache needs all keys anyway
    local       nothing: every rank has all keys and values, as in cross attention to a prompt

Per rank and call; the table in `sgl_npu.lowering.sequence.table` has the exact formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, four_dims
from sgl_npu.lowering.sequence.kv_gather import gathered_attention
from sgl_npu.lowering.sequence.positions import global_band, is_causal
from sgl_npu.lowering.sequence.schedule import Schedule, schedule, whole_keys_schedule
from sgl_npu.lowering.sequence.table import SCHEMES, SequenceScheme
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import Size, hint, known

Emit = Callable[[AttentionCall, Tensor], "tuple[Tensor, Tensor | None]"]

_NOTHING = "none: every rank has all these keys and values anyway, as of a prompt or right behind the embedding"


@dataclass(frozen=True)
class Chosen:
    """A scheme for one attention: `emit(call, ranks)` is traced in its place; `sent` are bytes per rank and call,
    `collectives` the messages of these degrees, or why there are none.

    `schedule(call)` counts what it does, step by step, for readers.

    `takes_whole_keys`: the call is to have all keys and values, from the gather that something else needs too.
    """

    name: str
    emit: Emit
    sent: Size
    collectives: str
    schedule: Callable[[AttentionCall], Schedule]
    refusals: tuple[tuple[str, str], ...] = ()
    takes_whole_keys: bool = False


def choose_scheme(
    call: AttentionCall,
    layout: SequenceLayout,
    kv_layout: SequenceLayout | None,
    mesh: SequenceMesh,
    allowed: Sequence[str],
    keys_are_gathered: bool = False,
) -> Chosen | None:
    """The cheapest allowed scheme for a call on local tensors; None if every one refuses it.

    `keys_are_gathered`: whether something else needs all keys and values on every rank.
    """
    if kv_layout is None:
        steps = partial(whole_keys_schedule, "local", layout=layout, ranks=mesh.size)
        return Chosen("local", partial(_attend_to_whole_keys, layout), 0, _NOTHING, steps)
    refused = refusals(call, layout, kv_layout, mesh, allowed)
    names = [name for name in allowed if name not in dict(refused)]
    found = [_on_mesh(SCHEMES[name], layout, kv_layout, mesh).chosen(call) for name in names]
    if keys_are_gathered and "kv_gather" in (x.name for x in found):
        shared = _shared_gather(call, layout, kv_layout, mesh)
        found = [x for x in found if x.name == "kv_gather"] if shared is None else [shared]
    best = min(found, key=lambda x: hint(x.sent), default=None)
    return None if best is None else replace(best, refusals=tuple(refused))


def _shared_gather(
    call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh
) -> Chosen | None:
    """Attention to the keys that are gathered anyway; None where the scheme's own exchange costs less."""
    # With ulysses a rank has pieces of its blocks. Causal, those take all keys and a mask, which is twice the work of
    # exchanged heads: 0.33 CPU seconds a rank and not 0.17 (4 ranks, S = 4096). Other attentions take all keys anyway.
    if layout.ulysses > 1 and is_causal(global_band(call, layout, kv_layout), layout, kv_layout):
        return None
    # One gather over all ranks is that of a grid without an axis ulysses.
    alone = SequenceMesh(mesh.whole, Axis(1, mesh.whole.group), mesh.whole)
    flat, kv_flat = (replace(x, blocks=mesh.size, ulysses=1) for x in (layout, kv_layout))
    sent = SCHEMES["kv_gather"].bytes(call, flat, kv_flat, alone)
    emit = partial(_attend_to_whole_keys, layout)
    keys = hint(kv_layout.length)
    steps = partial(whole_keys_schedule, "kv_gather", layout=layout, ranks=mesh.size, sent=hint(sent), keys=keys)
    return Chosen("kv_gather", emit, sent, "1 all-gather", steps, takes_whole_keys=True)


def _attend_to_whole_keys(layout: SequenceLayout, call: AttentionCall, ranks: Tensor) -> tuple[Tensor, Tensor | None]:
    return gathered_attention(call, layout, ranks)


def refusals(
    call: AttentionCall,
    layout: SequenceLayout,
    kv_layout: SequenceLayout,
    mesh: SequenceMesh,
    allowed: Sequence[str],
) -> list[tuple[str, str]]:
    """(scheme, clause) for every allowed scheme that cannot serve the call."""
    clauses = ((name, _on_mesh(SCHEMES[name], layout, kv_layout, mesh).refuse(call)) for name in allowed)
    return [(name, clause) for name, clause in clauses if clause is not None]


@dataclass(frozen=True)
class _Row:
    """A scheme with the grid it sees: ulysses takes ranks that lie in a row of blocks as its own."""

    scheme: SequenceScheme
    layout: SequenceLayout
    kv_layout: SequenceLayout
    mesh: SequenceMesh
    turned: bool

    def refuse(self, call: AttentionCall) -> str | None:
        call = self._with_heads(call)
        if self.turned and (self.layout.zigzag or self.kv_layout.zigzag):
            return "the rows lie in zigzag, which serves rings and gathers: ulysses needs them in order"
        return self.scheme.refuse(call, self.layout, self.kv_layout, self.mesh)

    def chosen(self, call: AttentionCall) -> Chosen:
        sent = self.scheme.bytes(self._with_heads(call), self.layout, self.kv_layout, self.mesh)
        messages = self.scheme.messages(self._with_heads(call), self.layout, self.kv_layout, self.mesh)
        return Chosen(self.scheme.name, self._emit, sent, messages, self._steps)

    def _steps(self, call: AttentionCall) -> Schedule:
        return schedule(self.scheme.name, self._with_heads(call), self.layout, self.kv_layout, self.mesh)

    def _emit(self, call: AttentionCall, ranks: Tensor) -> tuple[Tensor, Tensor | None]:
        ranks = torch.flip(ranks, (0,)) if self.turned else ranks
        given = self._with_heads(call)
        out, lse = self.scheme.emit(given, self.layout, self.kv_layout, self.mesh, ranks)
        if given is call:
            return out, lse
        return out.transpose(0, 1), None if lse is None else lse.transpose(0, 1)

    def _with_heads(self, call: AttentionCall) -> AttentionCall:
        """The call with its batch as heads where a model has folded heads into the batch, and ulysses wants some."""
        is_folded = self.mesh.ulysses.size > 1 and known(call.query.size(1) == 1) and known(call.key.size(1) == 1)
        if not is_folded or call.sinks is not None:
            return call
        query, key, value = (x.transpose(0, 1) for x in (call.query, call.key, call.value))
        mask, bias = (None if x is None else four_dims(x).transpose(0, 1) for x in (call.mask, call.bias))
        return replace(call, query=query, key=key, value=value, mask=mask, bias=bias)


def _on_mesh(scheme: SequenceScheme, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh) -> _Row:
    if scheme.name != "ulysses" or mesh.ulysses.size > 1:
        return _Row(scheme, layout, kv_layout, mesh, False)
    turned = SequenceMesh(Axis(1, mesh.blocks.group), mesh.blocks, mesh.whole)
    layout, kv_layout = (replace(x, blocks=1, ulysses=x.blocks) for x in (layout, kv_layout))
    return _Row(scheme, layout, kv_layout, turned, True)
