"""Measure every sparse attention of a graph while it runs op by op.

A node knows its site, which a dispatched op does not, so the graph is interpreted. What a node was given is measured
right after it ran and then let go: nothing but the measures outlives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.report import Report
from sgl_npu.compiler.sparse_calls import READERS, op_name, sparse_sequences
from sgl_npu.compiler.sparse_quality import CallMeasure, measured
from sgl_npu.passes.site import site_id


def measuring(part: GraphModule, report: Report, compiled: Callable) -> Callable:
    """What runs the graph and puts into `report.measures` what it sees; `compiled` where it can see nothing.

    That is so for graphs without a sparse attention, and for inner compilers: they run their own code, not the graph.
    """
    sites = {node: found for node in part.graph.nodes if (found := _measurable(node)) is not None}
    if report.inner != "eager" or not sites:
        return compiled
    measures = report.measures = report.measures if report.measures is not None else {}

    def run(args: list[Any]) -> Any:
        return _Measuring(part, sites, measures).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _measurable(node: fx.Node) -> int | None:
    """The site that the node is the sparse attention of."""
    return site_id(node) if node.op == "call_function" and op_name(node.target) in READERS else None


class _Measuring(fx.Interpreter):
    """`measures`: by site, of its last call."""

    def __init__(self, part: GraphModule, sites: dict[fx.Node, int], measures: dict[int, CallMeasure]) -> None:
        super().__init__(part)
        self.sites, self.measures = sites, measures
        self.extra_traceback = False  # errors of the model stay as they are

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.sites:
            self._measure(n, result)
        return result

    @torch.no_grad()
    def _measure(self, node: fx.Node, result: Any) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if any(isinstance(x, torch.Tensor) and (isinstance(x, FakeTensor) or x.is_meta) for x in args):
            return
        site = self.sites[node]
        before = self.measures.get(site)
        found = measured(
            sparse_sequences(node.target, args, kwargs, result), runs=1 if before is None else before.runs + 1
        )
        if found is not None:
            self.measures[site] = found
