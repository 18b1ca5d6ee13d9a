"""The ways to share one attention among ranks, ours and the references, behind one signature.

An adapter makes of a `Task` a function of the local query, key and value, (1, H, S, D) in the memory order of a model,
to the local output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.sequence.torch_ring import FLASH, ROTATIONS, torch_ring
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh

HEADS, HEAD_SIZE = 16, 64
OURS = "sgl_npu.lowering.sequence"  # has a module for each scheme, with a function of its name

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One attention of a sequence of that length."""

    length: int
    dtype: torch.dtype
    causal: bool


@dataclass(frozen=True)
class Scheme:
    """`by_heads`: ranks exchange heads, so that a causal sequence needs no balance. `package`: what it comes from."""

    adapt: Callable[[Task, SequenceLayout], Attend]
    by_heads: bool = False
    package: str = "torch"

    @property
    def exists(self) -> bool:
        return find_spec(self.package) is not None

    def layout(self, task: Task) -> SequenceLayout:
        size = dist.get_world_size()
        blocks, ulysses = (1, size) if self.by_heads else (size, 1)
        return SequenceLayout((task.length,), blocks, ulysses, zigzag=task.causal and not self.by_heads)


def single(task: Task) -> Attend:
    """The whole attention on one rank."""
    return lambda query, key, value: FLASH(query, key, value, 0.0, task.causal)[0]


def place(layout: SequenceLayout) -> Tensor:
    """Int64 (2,): this rank's index on the axes blocks and ulysses."""
    return torch.tensor([dist.get_rank() // layout.ulysses, dist.get_rank() % layout.ulysses])


def _reference(rotation: str, task: Task, layout: SequenceLayout) -> Attend:
    return torch_ring(rotation, task.causal)


def _ours(name: str, inner: str, task: Task, layout: SequenceLayout) -> Attend:
    """The scheme as the compiler traces it, its attentions lowered to the kernels of the platform."""
    scheme = getattr(import_module(f"{OURS}.{name}"), name)
    mesh, ranks = _mesh(layout), place(layout)

    def attend(query: Tensor, key: Tensor, value: Tensor, ranks: Tensor) -> Tensor:
        upper = 0 if task.causal else None
        call = AttentionCall(query, key, value, scale=HEAD_SIZE**-0.5, upper=upper, inner=inner)
        found = scheme(call, layout, layout, mesh, ranks)
        return found if isinstance(found, Tensor) else found[0]

    rows = layout.local_length
    example = torch.empty(1, rows, HEADS, HEAD_SIZE, dtype=task.dtype).transpose(1, 2)
    traced = make_fx(attend, tracing_mode="fake")(example, example.clone(), example.clone(), ranks)
    compiled = torch.compile(traced, backend="sgl_npu", options={"inner": inner, "strict": True})
    return lambda query, key, value: compiled(query, key, value, ranks)


def _mesh(layout: SequenceLayout) -> SequenceMesh:
    """All ranks; an axis of one rank has a group of its own."""
    world = Axis(dist.get_world_size(), dist.group.WORLD.group_name)
    alone = [dist.new_group([rank]) for rank in range(world.size)][dist.get_rank()]
    lonely = Axis(1, alone.group_name)
    return SequenceMesh(lonely if layout.blocks == 1 else world, lonely if layout.ulysses == 1 else world, world)


SCHEMES: dict[str, Scheme] = {
    **{f"torch ring, {rotation}": Scheme(partial(_reference, rotation)) for rotation in ROTATIONS},
    **{
        f"{name}, inductor": Scheme(partial(_ours, name, "inductor"), name == "ulysses", OURS)
        for name in ("ulysses", "ring", "kv_gather")
    },
}
