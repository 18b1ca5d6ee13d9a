"""Fills a `Trace` while the passes run. Only `explain` has one, and what goes wrong in it is nobody's error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.graph_text import value_text
from sgl_npu.compiler.harmless import harmless
from sgl_npu.compiler.trace import Raster, Trace
from sgl_npu.compiler.trace_graph import around, at_hand, is_at_hand, layer_costs, tensor_bytes
from sgl_npu.compiler.trace_kernel_mask import note_kernel_masks
from sgl_npu.compiler.trace_raster import of_condition, readable
from sgl_npu.lowering.sequence.schedule import Schedule
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.site import AttentionSite, SiteRecord, site_id
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.packed_attention import packed_attention
from sgl_npu.runtime.sizes import expression

_STARTS = (attention, packed_attention, aten._softmax.default, aten._safe_softmax.default)


class Tracer:
    """Notes of one Dynamo graph. A pass that is undone and its successors note anew."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._before: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._pictures: dict[Any, Raster | None] = {}

    @harmless
    def begin(self, gm: GraphModule) -> None:
        """Before the passes: the graph around everything that is, or may be, an attention."""
        self.trace.before = layer_costs(gm)
        for part in _graphs(gm):
            for node in part.graph.nodes:
                if site_id(node) is None and node.target in _STARTS:
                    self._before[node.name] = self._shared(around([node]))
            for number, nodes in _marked(part).items():
                site = self.trace.site(number)
                site.before = self._shared(around(nodes))
                for node in nodes:
                    if node.target is packed_attention:
                        site.packed, site.packed_sides = True, (node.kwargs.get("before"), node.kwargs.get("after"))

    @harmless
    def found(self, node: fx.Node, record: SiteRecord) -> None:
        """An attention was found whose node was not known to be one."""
        site = self.trace.site(record.id)
        site.before = site.before or self._before.get(node.name, "")

    @harmless
    def step(self, record: SiteRecord, name: str, text: str) -> None:
        self.trace.site(record.id).steps[name] = text

    @harmless
    def given_mask(self, site: AttentionSite) -> None:
        """Before the mask is proved: the sizes at hand, and the mask as it is."""
        self.found(site.node, site.record)
        query, key, value = (site.tensor(name) for name in ("query", "key", "value"))
        assert query is not None and key is not None and value is not None
        own = self.trace.site(site.record.id)
        if all(is_at_hand(size) for x in (query, key, value) for size in x.shape):
            own.query, own.key, own.value = (tuple(at_hand(size) for size in x.shape) for x in (query, key, value))
        tensors = [x for name in ("mask", "bias") if (x := site.argument(name)) is not None]
        own.mask_given = " + ".join(value_text(x) for x in tensors)
        own.mask_bytes = sum(tensor_bytes(x.meta["val"]) for x in tensors), 0

    @harmless
    def proved_mask(self, site: AttentionSite, conditions: Sequence[sympy.Basic | None]) -> None:
        """After it: the band, and what stays a tensor under which condition (None where nothing is known)."""
        own = self.trace.site(site.record.id)
        own.lower, own.upper = (None if side is None else at_hand(side) for side in (site.lower, site.upper))
        mask, bias = site.argument("mask"), site.argument("bias")
        tensors = [x for x in (mask, bias) if x is not None]
        own.mask_kept = " + ".join(value_text(x) for x in tensors)
        own.mask_bytes = own.mask_bytes[0], sum(tensor_bytes(x.meta["val"]) for x in tensors)
        own.mask_node = "" if mask is None else mask.name
        own.condition, own.raster = "", None
        if mask is not None and own.query and conditions and None not in conditions:
            condition = sympy.And(*conditions)
            own.condition = readable(condition)
            own.raster = self._picture(condition, _hints(site), own.query[2], own.key[2])

    @harmless
    def packed(self, record: SiteRecord, before: int | None, after: int | None) -> None:
        """Its documents became packed sequences, each with that band."""
        site = self.trace.site(record.id)
        site.packed, site.packed_sides = True, (before, after)

    @harmless
    def scheduled(self, record: SiteRecord, schedule: Schedule) -> None:
        self.trace.site(record.id).schedule = schedule

    @harmless
    def end(self, gm: GraphModule) -> None:
        """After the passes: the same again."""
        self.trace.after = layer_costs(gm)
        for part in _graphs(gm):
            marked = _marked(part)
            for number, nodes in marked.items():
                self.trace.site(number).after = self._shared(around(nodes))
            note_kernel_masks(self.trace, marked)
        self._before.clear()

    def _shared(self, text: str) -> str:
        """Equal texts are one."""
        return self._texts.setdefault(text, text)

    def _picture(self, condition: sympy.Basic, sizes: dict, rows: int, keys: int) -> Raster | None:
        key = condition, rows, keys, tuple(sizes.items())
        if key not in self._pictures:
            self._pictures[key] = of_condition(condition, sizes, rows, keys)
        return self._pictures[key]


def _graphs(gm: GraphModule) -> list[GraphModule]:
    return [module for module in gm.modules() if isinstance(module, GraphModule)]


def _marked(part: GraphModule) -> dict[int, list[fx.Node]]:
    """The nodes of every site of a graph."""
    found: dict[int, list[fx.Node]] = {}
    for node in part.graph.nodes:
        number = site_id(node)
        if number is not None:
            found.setdefault(number, []).append(node)
    return found


def _hints(site: AttentionSite) -> dict[sympy.Symbol, int]:
    """The values at hand of the symbols of the site's graph."""
    found = {}
    for node in site.node.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(size, torch.SymInt) and (symbol := expression(size)).is_Symbol:
                found[symbol] = at_hand(size)
    return found
