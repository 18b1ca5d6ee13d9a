"""Bytes: what one attention moves, and what the ops of each layer write before the passes and after them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sgl_npu.compiler.html.numbers import bytes_text, change_text
from sgl_npu.compiler.trace import LayerCost, SiteTrace, Trace
from sgl_npu.compiler.trace_graph import OUTSIDE
from sgl_npu.passes.site import SiteRecord


def site_bytes(site: SiteRecord, trace: SiteTrace | None) -> list[tuple[str, str]]:
    """Predicted bytes of one call, (what, how many). They follow from shapes; nothing was measured."""
    rows = []
    shapes, dtype = _shapes(site, trace), getattr(torch, site.dtype or "-", None)
    if shapes is not None and isinstance(dtype, torch.dtype):
        (query, key, value), size = shapes, dtype.itemsize
        rows.append(("query, key and value, read", bytes_text(sum(map(math.prod, shapes)) * size)))
        rows.append(("result, written", bytes_text(math.prod(query[:-1]) * value[-1] * size)))
        if len(query) == 4:
            scores = bytes_text(math.prod(query[:3]) * key[2] * size)
            rows.append(("scores" + (", never written" if site.fused else ""), scores))
    if trace is not None and (trace.mask_given or trace.mask_kept):
        rows.append(("mask as the model has it", _mask_text(trace.mask_given, trace.mask_bytes[0])))
        rows.append(("mask left as a tensor", _mask_text(trace.mask_kept, trace.mask_bytes[1])))
    if trace is not None and trace.kernel_mask:
        shared = f", shared by {trace.kernel_mask_sites}" if trace.kernel_mask_sites > 1 else ""
        rows.append(("mask for the kernel" + shared, _mask_text(trace.kernel_mask, trace.kernel_mask_bytes)))
    if site.sent:
        schedule = None if trace is None else trace.schedule
        sent = site.sent if schedule is None else str(schedule.total("send"))
        rows.append(("sent by one rank", bytes_text(int(sent)) if sent.isdigit() else f"{sent} B"))
    return rows


def _shapes(site: SiteRecord, trace: SiteTrace | None) -> tuple[tuple[int, ...], ...] | None:
    """Of query, key and value, by the sizes at hand; None where they are symbols of which nobody knows the value."""
    if trace is not None and trace.query:
        return trace.query, trace.key, trace.value
    if not all(site.shapes) or not all(size.isdigit() for shape in site.shapes for size in shape):
        return None
    return tuple(tuple(map(int, shape)) for shape in site.shapes)


def _mask_text(text: str, size: int) -> str:
    return f"{bytes_text(size)} ({text})" if text else "none"


@dataclass(frozen=True)
class LayerRow:
    """Layers that cost the same; `share` is what is left of the bytes."""

    name: str
    count: int
    before: LayerCost
    after: LayerCost

    @property
    def bytes_before(self) -> str:
        return bytes_text(self.before.bytes)

    @property
    def bytes_after(self) -> str:
        return bytes_text(self.after.bytes)

    @property
    def change(self) -> str:
        return change_text(self.before.bytes, self.after.bytes)

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer, and not what is outside of all."""
        return self.name != OUTSIDE

    @property
    def share(self) -> float:
        return 100 * self.after.bytes / max(self.before.bytes, self.after.bytes, 1)


def layer_rows(trace: Trace) -> list[LayerRow]:
    """Neighbouring layers of the same name and cost share a row; layers in the order of the graph."""
    rows: list[tuple[list[str], LayerCost, LayerCost]] = []
    for name in dict.fromkeys([*trace.before, *trace.after]):
        before, after = trace.before.get(name, LayerCost()), trace.after.get(name, LayerCost())
        same = (x for x in rows if x[1:] == (before, after) and _stem(x[0][0]) == _stem(name))
        row = next(same, None)
        if row is None:
            rows.append(([name], before, after))
        else:
            row[0].append(name)
    return [LayerRow(_joined(names), len(names), before, after) for names, before, after in rows]


def _stem(name: str) -> str:
    return re.sub(r"\d+$", "", name)


def _joined(names: list[str]) -> str:
    """layers.0, layers.1, layers.2 as layers.0-2."""
    if len(names) == 1:
        return names[0]
    numbers = [int(re.findall(r"\d+$", name)[0]) for name in names]
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"{_stem(names[0])}{', '.join(runs)}"


def squares(trace: Trace) -> tuple[int, int, int, int]:
    """Tensors of the size of scores, a query's length by a key's: number and bytes before, number and bytes after."""
    sizes = {(site.query[2], site.key[2]) for site in trace.sites.values() if len(site.query) == 4}
    sizes = {pair for pair in sizes if min(pair) > 1}
    return *_squares(trace.before.values(), sizes), *_squares(trace.after.values(), sizes)


def _squares(costs: Iterable[LayerCost], sizes: set[tuple[int, int]]) -> tuple[int, int]:
    found = [cost.squares[pair] for cost in costs for pair in cost.squares.keys() & sizes]
    return sum(count for count, _ in found), sum(size for _, size in found)
