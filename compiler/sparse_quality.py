"""How good a sparse attention is: how much of dense attention it computes, and how far its result is from it.

    density   share of the pairs of a query and a key that are computed
    recall    share of the dense softmax that falls on them, per query
    error     distance of the result from dense attention of the same query, key and value

Density is counted over all blocks. Recall and error are measured in float32 on sampled queries of every head, so that
nothing of the size of S x S is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.compiler.block_picture import picture, svg
from sgl_npu.compiler.sparse_calls import SparseSequence
from sgl_npu.passes.site import SiteRecord

SAMPLED_ROWS = 256  # queries of each head that are measured: 1.2 % of a dense attention of 32k tokens
_SCORES = 1 << 23  # in memory at once
_TINY = 1e-30  # what is divided by where all values are 0


@dataclass(frozen=True, eq=False)
class SparseQuality:
    """The quality of one sparse attention in one call of the model: in the last of the `runs` that it made of it.

    `blocks`: bool (B, Hq, query blocks, key blocks), True where a block is computed, in the order of tokens that the
    kernel gets: rain fusion's blocks are tiles of the frames. `block_shape`: queries and keys of a block.

    `density`, `recall` and `worst_recall` are shares, from 0 to 1. Recall is the mean of all heads and measured
    queries, the worst one that of a single query. `error` is the largest difference from dense attention, relative to
    the largest dense value; `error_l2` the same in Euclidean norms. Both hold the kernel's rounding too.
    `density_per_head` and `recall_per_head` are (B, Hq). `rows` queries of each head were measured, of `tokens`.
    """

    site: int
    module: str
    op: str
    sparse: str
    density: float
    recall: float
    worst_recall: float
    error: float
    error_l2: float
    rows: int
    tokens: int
    runs: int
    block_shape: tuple[int, int]
    density_per_head: Tensor = field(repr=False)
    recall_per_head: Tensor = field(repr=False)
    blocks: Tensor = field(repr=False)

    def picture(self, batch: int = 0, head: int = 0) -> str:
        """The computed blocks of one head as text, 66 columns wide or less: queries downwards, keys to the right."""
        return f"{self._place(batch)}\n{self._caption(batch, head)}\n{picture(self._selected(batch, head))}"

    def to_svg(self, path: str | Path, batch: int = 0, heads: Sequence[int] | None = None) -> None:
        """Write the computed blocks as a picture, a square for each of the `heads`, all of them unless given."""
        chosen = range(self.blocks.size(1)) if heads is None else heads
        cells = [(self._selected(batch, head), self._caption(batch, head)) for head in chosen]
        Path(path).write_text(svg(cells, self._place(batch)), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The numbers without the tensors, for JSON."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}

    def _selected(self, batch: int, head: int) -> Tensor:
        for name, index, size in (("batch", batch, self.blocks.size(0)), ("head", head, self.blocks.size(1))):
            if not 0 <= index < size:
                raise IndexError(f"{name} = {index}: should be from 0 to {size - 1}")
        return self.blocks[batch, head]

    def _place(self, batch: int) -> str:
        rows, columns = self.block_shape
        shape = f"{self.blocks.size(2)} x {self.blocks.size(3)} blocks of {rows} x {columns}"
        return f"{self.module or f'site {self.site}'}, batch {batch}: {shape}"

    def _caption(self, batch: int, head: int) -> str:
        self._selected(batch, head)
        density, recall = self.density_per_head[batch, head], self.recall_per_head[batch, head]
        return f"head {head}: density {density:.3f}, recall {recall:.3f}"


@dataclass(frozen=True)
class RowMeasures:
    """Of sampled queries, each (Hq, rows): recall, and of the Dv values of a row the largest and the sum of squares."""

    recall: Tensor
    largest: Tensor
    largest_error: Tensor
    squares: Tensor
    squared_error: Tensor

    def subset(self, count: int, generator: torch.Generator) -> RowMeasures:
        """`count` random rows of these; all, if there are not as many."""
        chosen = torch.randperm(self.recall.size(1), generator=generator)[:count]
        return RowMeasures(*(getattr(self, x.name)[:, chosen] for x in fields(self)))


@dataclass(frozen=True)
class SequenceMeasure:
    """What is kept of a sequence, on CPU. `computed` (Hq,) of `pairs` pairs of a query and a key are computed."""

    selected: Tensor
    computed: Tensor
    pairs: int
    tokens: int
    rows: RowMeasures


@dataclass(frozen=True)
class CallMeasure:
    """What is kept of a call of a sparse attention, and how many calls it was the last of."""

    block_shape: tuple[int, int]
    sequences: list[SequenceMeasure]
    runs: int = 1


def measured(sequences: Iterable[SparseSequence], runs: int = 1) -> CallMeasure | None:
    """Measure one call, a sequence at a time; None where all are empty."""
    shape, found = (0, 0), []
    for sequence in sequences:
        shape = sequence.block_shape
        tokens, keys = sequence.query.size(1), sequence.key.size(1)
        found.append(
            SequenceMeasure(
                sequence.selected.cpu(), _computed(sequence).cpu(), tokens * keys, tokens, _measured_rows(sequence)
            )
        )
    return CallMeasure(shape, found, runs) if found else None


def quality(site: SiteRecord, call: CallMeasure, sample: int, seed: int) -> SparseQuality:
    """What was measured of a site, put together from `sample` random rows of it."""
    generator = torch.Generator().manual_seed(seed)
    rows = [sequence.rows.subset(sample, generator) for sequence in call.sequences]
    recall = torch.cat([x.recall for x in rows], 1)
    computed = torch.stack([x.computed for x in call.sequences])
    pairs = torch.tensor([x.pairs for x in call.sequences], dtype=torch.float64)

    def worst(name: str) -> float:
        return max(getattr(x, name).max().item() for x in rows)

    def total(name: str) -> float:
        return sum(getattr(x, name).sum(dtype=torch.float64).item() for x in rows)

    return SparseQuality(
        site=site.id,
        module=site.module,
        op=site.op,
        sparse=site.sparse,
        density=(computed.sum() / (pairs.sum() * computed.size(1))).item(),
        recall=recall.mean().item(),
        worst_recall=recall.min().item(),
        error=worst("largest_error") / max(worst("largest"), _TINY),
        error_l2=(total("squared_error") / max(total("squares"), _TINY)) ** 0.5,
        rows=max(x.recall.size(1) for x in rows),
        tokens=max(x.tokens for x in call.sequences),
        runs=call.runs,
        block_shape=call.block_shape,
        density_per_head=(computed / pairs[:, None]).float(),
        recall_per_head=torch.stack([x.recall.mean(1) for x in rows]),
        blocks=_stacked([x.selected for x in call.sequences]),
    )


def _stacked(masks: Sequence[Tensor]) -> Tensor:
    """One batch of the blocks of all sequences; shorter ones have none behind their end."""
    rows, columns = (max(mask.size(axis) for mask in masks) for axis in (1, 2))
    return torch.stack([F.pad(mask, (0, columns - mask.size(2), 0, rows - mask.size(1))) for mask in masks])


def _computed(sequence: SparseSequence) -> Tensor:
    """Float64 (Hq,): pairs of a query and a key in the selected blocks. The last block of either may be smaller."""
    rows, columns = (
        (length - torch.arange(count, device=sequence.query.device) * size).clamp(max=size).double()
        for length, count, size in zip(
            (sequence.query.size(1), sequence.key.size(1)),
            sequence.selected.shape[1:],
            sequence.block_shape,
            strict=True,
        )
    )
    return sequence.selected.double() @ columns @ rows


def _sampled(length: int, device: torch.device) -> Tensor:
    """Int64 (rows,), ascending: one random row of each of as many equal parts of a sequence; all of a short one."""
    count = min(length, SAMPLED_ROWS)
    within = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(count) + within) * (length / count)).long().clamp(max=length - 1).to(device)


def _measured_rows(sequence: SparseSequence) -> RowMeasures:
    """By key head and a few rows at a time."""
    heads, tokens = sequence.query.shape[:2]
    kv_heads, keys = sequence.key.shape[:2]
    group = heads // kv_heads
    every = _sampled(tokens, sequence.query.device)
    parts = every.split(max(1, _SCORES // (keys * group)))
    found = []
    for head, (key, value) in enumerate(zip(sequence.key, sequence.value, strict=True)):
        own = slice(head * group, (head + 1) * group)
        wide = key.float(), value.float()
        of_head = [_measured_part(sequence, own, rows, *wide) for rows in parts]
        found.append([torch.cat(x, 1) for x in zip(*of_head, strict=True)])
    return RowMeasures(*(torch.cat(x).cpu() for x in zip(*found, strict=True)))


def _measured_part(sequence: SparseSequence, heads: slice, rows: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The fields of `RowMeasures` for `rows` of some heads, given their key and value in float32."""
    size, columns = sequence.block_shape[1], sequence.selected.size(2)
    scores = sequence.query[heads, rows].float() * sequence.scale @ key.T
    weights = scores.softmax(-1)
    by_block = F.pad(weights, (0, columns * size - weights.size(2))).unflatten(2, (columns, size)).sum(3)
    kept = sequence.selected[heads, rows // sequence.block_shape[0]]
    dense = weights @ value
    error = sequence.out[heads, rows].float() - dense
    return [
        (by_block * kept).sum(2).clamp(max=1.0),
        dense.abs().amax(2),
        error.abs().amax(2),
        dense.square().sum(2),
        error.square().sum(2),
    ]
