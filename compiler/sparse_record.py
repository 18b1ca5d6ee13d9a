"""Measure every sparse attention of a graph while it runs op by op: nothing but the measures outlives the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sgl_npu.compiler.report import Report
from sgl_npu.compiler.sparse_calls import READERS, op_name, sparse_sequences
from sgl_npu.compiler.sparse_quality import CallMeasure, measured
from sgl_npu.compiler.watch import Watcher
from sgl_npu.passes.site import site_id


def sparse_watchers(graph: fx.Graph, report: Report) -> dict[fx.Node, Watcher]:
    """For every sparse attention: what measures it. The measures go into `report.measures`."""
    sites = {node: found for node in graph.nodes if (found := _measurable(node)) is not None}
    if not sites:
        return {}
    measures = report.measures = report.measures if report.measures is not None else {}
    return {node: _measurer(node, site, measures) for node, site in sites.items()}


def _measurable(node: fx.Node) -> int | None:
    """The site that the node is the sparse attention of."""
    return site_id(node) if node.op == "call_function" and op_name(node.target) in READERS else None


def _measurer(node: fx.Node, site: int, measures: dict[int, CallMeasure]) -> Watcher:
    @torch.no_grad()
    def measure(args: tuple, kwargs: dict, result: Any) -> None:
        before = measures.get(site)
        runs = 1 if before is None else before.runs + 1
        found = measured(sparse_sequences(node.target, args, kwargs, result), runs=runs)
        if found is not None:
            measures[site] = found

    return measure
