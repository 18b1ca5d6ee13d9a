"""`shard="inputs"`: the caller's tensors are one rank's rows already, and so are the results.

before: attention to this rank's rows; positions arange(L), which start at 0 on every rank
after:  a scheme over the rows of all ranks; positions that are those of the whole sequence

What the rows are in the sequence is the layout of `placement`; every rank has the same number of them. The plan of
the whole graph tells which tensors lie along the sequence: there, a slice of what all ranks have would be taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sgl_npu.lowering.kernel import four_dims
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.shard_plan import Plan, SitePlan
from sgl_npu.passes.shard_rules import operands
from sgl_npu.passes.shard_spec import Sharding
from sgl_npu.passes.site import place
from sgl_npu.runtime.collectives import all_gather, wait
from sgl_npu.runtime.sequence import SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import Size, guard, known

POSITIONS = (aten.arange.default, aten.arange.start, aten.arange.start_step, torch.ops.prims.iota.default)


@dataclass(frozen=True)
class Sources:
    """Where the sequence comes from: nodes of positions, to be replaced, and what cannot have a global meaning."""

    positions: list[tuple[fx.Node, SequenceLayout]]
    refused: str


def sources(plan: Plan) -> Sources:
    """What the plan would slice, sorted; inputs of the graph are this rank's rows as they are."""
    if plan.gathers:
        ops = ", ".join(dict.fromkeys(place(gather.user) for gather in plan.gathers))
        return Sources(
            [], f"shard = 'inputs': {ops} mixes the rows of the ranks; call it outside of the compiled model"
        )
    positions: list[tuple[fx.Node, SequenceLayout]] = []
    refused: list[str] = []
    for node, sharding in dict(_slices(plan)).items():
        if node.op == "placeholder" and known(node.meta["val"].shape[sharding.dim] == sharding.size):
            continue
        if node.target in POSITIONS and _starts_at_zero(node):
            positions.append((node, sharding.layout))
        else:
            refused.append(place(node) if node.op == "call_function" else str(node.target))
    text = f"shard = 'inputs': {', '.join(refused)} has no known meaning for the whole sequence; pass it as an input"
    return Sources(positions, text if refused else "")


def _slices(plan: Plan) -> Iterator[tuple[fx.Node, Sharding]]:
    for node, step in plan.steps.items():
        for source, needed in zip(operands(node), step.needed, strict=True):
            if needed is not None and plan.sharding(source) is None:
                yield source, needed
    for site in plan.sites.values():
        for name in ("query", "key", "value"):
            source, needed = site.site.argument(name), site.needed(name)
            if source is not None and needed is not None and plan.sharding(source) is None:
                yield source, needed


def _starts_at_zero(node: fx.Node) -> bool:
    if node.target is torch.ops.prims.iota.default:
        return node.kwargs.get("start", 0) == 0 and node.kwargs.get("step", 1) == 1
    if node.target is aten.arange.default:
        return True
    step = node.args[2] if len(node.args) > 2 else 1
    return node.args[0] == 0 and step == 1


def whole_layout(local: SequenceLayout, mesh: SequenceMesh, zigzag: bool) -> SequenceLayout:
    """The layout of the sequence of which a rank has `local.length` rows."""
    segments = tuple(length * mesh.size for length in local.segments)
    return SequenceLayout(segments, mesh.blocks.size, mesh.ulysses.size, zigzag and len(segments) == 1)


def refuse_site(plan: SitePlan, rows: Size, zigzag: bool) -> str:
    """Why an attention over this rank's rows cannot be made one over all ranks'; "" if it can."""
    site = plan.site
    if plan.key_layout is None:
        return "" if site.lower is None and site.upper is None else "a band over keys that are not of the sequence"
    if zigzag and not guard(rows % 2 == 0):
        return f"placement = 'zigzag' with {rows} rows per rank: a rank has two halves"
    for name in ("mask", "bias"):
        tensor = site.tensor(name)
        if tensor is not None and tensor.dim() >= 2 and not guard(tensor.size(-2) == 1):
            return (
                f"a {name} of this rank's rows and keys alone, {tuple(tensor.shape)}: what it is for others is unknown"
            )
    return ""


def gathered_columns(x: Tensor, layout: SequenceLayout, mesh: SequenceMesh) -> Tensor:
    """A mask or bias over this rank's keys, the same for all queries, as one over all keys."""
    x = four_dims(x)
    if guard(x.size(3) == 1):
        return x
    numbers = x.to(torch.uint8) if x.dtype is torch.bool else x
    rows = wait(all_gather(numbers.permute(3, 0, 1, 2).contiguous(), mesh.whole))
    if not layout.is_rank_major:
        rows = rows.index_select(0, layout.gathered_index(x.device))
    return rows.permute(1, 2, 3, 0).to(x.dtype)


def global_positions(dtype: torch.dtype, layout: SequenceLayout, ranks: Tensor) -> tuple[Tensor]:
    """The positions of this rank's rows."""
    return (layout.positions(ranks).to(dtype),)
