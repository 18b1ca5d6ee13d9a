"""cos and sin as a fused rotary embedding reads them: (T, r), a row per token, from wherever the graph has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, fx

from sgl_npu.passes.channels import CHANNEL, HEAD, ROW, SAMPLE, Factors, Labels, Stuck
from sgl_npu.passes.rotary import Signed
from sgl_npu.runtime.sizes import Size


@dataclass(frozen=True)
class Run:
    """Channels start, start + step, … of a table, `count` of them, with a sign."""

    node: fx.Node
    labels: Labels
    sign: int
    start: int
    step: int
    count: int


@dataclass(frozen=True)
class Table:
    """The columns of a table, put together of runs, `repeats` times."""

    runs: tuple[Run, ...]
    repeats: int = 1

    def rows(self, tensors: dict[fx.Node, Tensor], samples: Size, length: Size) -> Tensor:
        """(samples * length, columns)."""
        parts = [_part(run, tensors[run.node]) for run in self.runs]
        if len(parts) > 1:  # some may be the same for all samples or rows
            parts = [part.expand(samples, length, part.shape[-1]) for part in parts]
        whole = parts[0] if len(parts) * self.repeats == 1 else torch.cat([*parts] * self.repeats, -1)
        columns = whole.shape[-1]
        return whole.expand(samples, length, columns).reshape(samples * length, columns)


def table(factors: Factors, columns: Sequence[Signed], repeats: int) -> Table | Stuck:
    """Where the graph has these factors."""
    whole = factors.tables.get(tuple(columns))
    if whole is not None and HEAD not in whole[1]:
        return Table((Run(*whole, 1, 0, 1, len(columns)),), repeats)
    places = []
    for number, sign in columns:
        if number not in factors.places:
            return Stuck("its cosines or sines are scaled where they are used")
        node, labels, place, own = factors.places[number]
        if HEAD in labels:
            return Stuck("every head has cosines or sines of its own")
        places.append((node, labels, place, sign * own))
    runs = []
    for (node, labels, sign), group in groupby(places, key=lambda x: (x[0], x[1], x[3])):
        runs += [Run(node, labels, sign, *x) for x in _progressions([place for _, _, place, _ in group])]
    half = len(runs) // 2
    if runs[:half] == runs[half:]:
        runs, repeats = runs[:half], 2 * repeats
    return Table(tuple(runs), repeats)


def _progressions(places: list[int]) -> list[tuple[int, int, int]]:
    """Starts, steps and counts of the longest runs of places that are equally far apart."""
    found: list[tuple[int, int, int]] = []
    while places:
        step = max(places[1] - places[0], 0) if len(places) > 1 else 0
        count = next((i for i, x in enumerate(places) if x != places[0] + i * step), len(places)) if step else 1
        found.append((places[0], step or 1, count))
        places = places[count:]
    return found


def _part(run: Run, tensor: Tensor) -> Tensor:
    """(samples or 1, rows or 1, count)."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    labels = list(run.labels)
    order = [dim for label in (SAMPLE, ROW, CHANNEL) for dim, x in enumerate(labels) if x == label]
    leads = [tensor.shape[labels.index(label)] if label in labels else 1 for label in (SAMPLE, ROW)]
    if order != sorted(order):
        tensor = tensor.permute(*order, *(dim for dim, label in enumerate(labels) if label is None))
    columns = tensor.reshape(*leads, -1)
    if (run.start, run.step, run.count) != (0, 1, columns.shape[-1]):
        columns = columns[..., run.start : run.start + (run.count - 1) * run.step + 1 : run.step]
    return columns if run.sign == 1 else -columns
