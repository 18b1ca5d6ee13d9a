"""What happened at every attention: `Report`, and the list of what this process has compiled."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sgl_npu.passes.parallel import ParallelReport
from sgl_npu.passes.site import SiteRecord as Site

__all__ = ["GraphReport", "Report", "Site", "merge", "record_report", "reports"]


@dataclass
class GraphReport:
    """One graph after the passes. `kind` is inference, forward or backward."""

    kind: str
    text: str
    nodes: int


@dataclass
class Report:
    """One Dynamo graph, or, from `explain`, all graphs that one call reached.

    `sites` are in graph order, fused or not. `graph` is stable text: no addresses, no versions.
    """

    platform: str = ""
    inner: str = ""
    sites: list[Site] = field(default_factory=list)
    graphs: list[GraphReport] = field(default_factory=list)
    parallel: list[ParallelReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def graph(self) -> str:
        """The final FX graphs as text."""
        return "\n".join(graph.text for graph in self.graphs)

    @property
    def fused(self) -> int:
        return sum(site.fused for site in self.sites)

    def counts(self) -> dict[str, int]:
        """How many sites ended in each op."""
        return dict(Counter(site.op or "not captured" for site in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {**asdict(self), "fused": self.fused, "counts": self.counts()}

    def __str__(self) -> str:
        from sgl_npu.compiler.report_table import render

        return render(self)


def merge(parts: Iterable[Report]) -> Report:
    """One report of several graphs, sites numbered through."""
    whole = Report()
    for part in parts:
        whole.platform, whole.inner = part.platform, part.inner
        whole.sites += [replace(site, id=len(whole.sites) + n) for n, site in enumerate(part.sites)]
        whole.graphs += part.graphs
        whole.parallel += part.parallel
        for name, seconds in part.seconds.items():
            whole.seconds[name] = whole.seconds.get(name, 0.0) + seconds
    return whole


_lock = threading.Lock()
_reports: list[Report] = []


def record_report(report: Report) -> None:
    with _lock:
        _reports.append(report)


def reports() -> list[Report]:
    """Everything this process has compiled so far, one report per Dynamo graph, oldest first."""
    with _lock:
        return list(_reports)
