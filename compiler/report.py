"""What happened at every attention: `Report`, and the list of what this process has compiled."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sgl_npu.compiler.numbers import is_whole
from sgl_npu.compiler.sparse_quality import SAMPLED_ROWS, CallMeasure, SparseQuality, quality
from sgl_npu.compiler.trace import Trace, merged_traces
from sgl_npu.lowering.sparse.setting import LASER
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

    `sites` are in graph order, fused or not. `graph` is stable text: no addresses, no versions. `measures` holds what
    `explain` saw of the sparse attentions, by site; None where nothing was run. `trace` is what it keeps for `to_html`.
    """

    platform: str = ""
    inner: str = ""
    sites: list[Site] = field(default_factory=list)
    graphs: list[GraphReport] = field(default_factory=list)
    parallel: list[ParallelReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    measures: dict[int, CallMeasure] | None = field(default=None, repr=False, compare=False)
    trace: Trace | None = field(default=None, repr=False, compare=False)

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

    def sparse_quality(self, sample: int = SAMPLED_ROWS, seed: int = 0) -> list[SparseQuality]:
        """How good the sparse attentions are, in graph order: density, recall, error and the blocks of each.

        `explain` measures them while it runs the call, on 256 queries of each head, or all where there are fewer.
        Recall and error are taken over `sample` of those queries, chosen by `seed`: how much they differ between
        seeds says how far to trust them. Of a site that ran several times it is the last run, and one that did not
        run is left out. Nothing that is sparse: an empty list.

        Raises ValueError for a `sample` that is not from 1 to 256 or a `seed` that torch does not take, and
        RuntimeError where the report cannot know: nothing was run, or by an inner compiler, whose choice of blocks
        nobody sees.
        """
        if not is_whole(sample) or not 1 <= sample <= SAMPLED_ROWS:
            raise ValueError(f"sample = {sample!r}: should be a number of queries from 1 to {SAMPLED_ROWS}")
        if not is_whole(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"seed = {seed!r}: should be an integer from 0 to 2**63 - 1; give any, as 0")
        sites = [site for site in self.sites if site.sparse and site.kernel != LASER]
        if not sites:
            return []
        if self.measures:
            return [
                quality(site, self.measures[site.id], int(sample), int(seed))
                for site in sites
                if site.id in self.measures
            ]
        if self.inner != "eager":
            raise RuntimeError(
                f"sparse_quality: the call ran under inner = {self.inner!r}, whose choice of blocks cannot be seen; "
                "call sgl_npu.explain(model, *args, options=...) without inner in its options: it runs op by op then"
            )
        if self.measures is None:
            raise RuntimeError(
                "sparse_quality: this report is of a compilation, which says nothing of values; "
                "sgl_npu.explain(model, *args, options=...) runs the call and measures it"
            )
        raise RuntimeError(
            "sparse_quality: no sparse attention ran with data: either the inputs are fake tensors, or the call ran "
            "its dense graph, as in the steps that skip_first_steps counts; call explain in "
            "`with sgl_npu.denoising_step(i):`"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        plain = asdict(replace(self, measures=None, trace=None))
        del plain["measures"], plain["trace"]
        found = [x.to_dict() for x in self.sparse_quality()] if self.measures else []
        return {**plain, "fused": self.fused, "counts": self.counts(), "sparse_quality": found}

    def to_html(self, path: str | Path, title: str = "") -> None:
        """Write the report as one HTML file that needs no network: docs/report.md says what it shows.

        A report of `explain` has pictures, graphs and sizes that one of a compilation (`reports()`) lacks. Raises
        OSError where the file cannot be written.
        """
        from sgl_npu.compiler.html import page

        Path(path).write_text(page(self, title), encoding="utf-8")

    def __str__(self) -> str:
        from sgl_npu.compiler.report_table import render, terminal_width

        return render(self, terminal_width())


def merge(parts: Iterable[Report]) -> Report:
    """One report of several graphs, sites numbered through."""
    whole = Report()
    traces = []
    for part in parts:
        whole.platform, whole.inner = part.platform, part.inner
        numbers = {site.id: len(whole.sites) + n for n, site in enumerate(part.sites)}
        whole.sites += [replace(site, id=numbers[site.id]) for site in part.sites]
        if part.measures is not None:
            own = {numbers[site]: measure for site, measure in part.measures.items()}
            whole.measures = {**(whole.measures or {}), **own}
        if part.trace is not None:
            traces.append(part.trace.renumbered(numbers))
        whole.graphs += part.graphs
        whole.parallel += part.parallel
        for name, seconds in part.seconds.items():
            whole.seconds[name] = whole.seconds.get(name, 0.0) + seconds
    whole.trace = merged_traces(traces) if traces else None
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
