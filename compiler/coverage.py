"""`expect`: a contract on a report, for a user's CI. Every number is the least coverage that is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sgl_npu.compiler.report import Report, Site


class CoverageError(AssertionError):
    """A report covers less than was asked; the message lists what is missing, and why."""


def expect(
    report: Report,
    *,
    fused: Literal["all"] | int | None = "all",
    graphs: int | None = None,
    ops: Mapping[str, int] | None = None,
) -> None:
    """Raise CoverageError unless the report holds what is asked; None asks nothing.

    `fused`: "all" sites (and at least one), or at least so many. `graphs`: at most so many Dynamo graphs, so
    that `graphs=1` means no graph break; a backward graph counts with its forward. `ops`: at least so many
    sites per op.
    """
    _check(report, fused, graphs, ops or {})
    problems = [*_fused_problems(report, fused), *_graph_problems(report, graphs)]
    counts = report.counts()
    for op, least in (ops or {}).items():
        if counts.get(op, 0) < least:
            found = ", ".join(f"{count} x {name}" for name, count in counts.items()) or "no site"
            problems.append(f"{counts.get(op, 0)} sites ended in {op}, {least} were expected; found {found}")
    if problems:
        raise CoverageError("\n".join(problems))


def _check(report: object, fused: object, graphs: object, ops: object) -> None:
    if not isinstance(report, Report):
        raise ValueError(f"report = {report!r}: expected a Report, as sgl_npu.explain(model, ...) returns it")
    if fused is not None and fused != "all" and not _is_count(fused):
        raise ValueError(f"fused = {fused!r}: should be 'all', a number of sites, or None to leave it unchecked")
    if graphs is not None and not _is_count(graphs):
        raise ValueError(f"graphs = {graphs!r}: should be a number of graphs, or None to leave it unchecked")
    if not isinstance(ops, Mapping):
        raise ValueError(f"ops = {ops!r}: should map op names to numbers, as Report.counts() does")
    for op, least in ops.items():
        if not isinstance(op, str) or not _is_count(least):
            raise ValueError(f"ops = {{{op!r}: {least!r}}}: should map op names to numbers, as Report.counts() does")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fused_problems(report: Report, fused: Literal["all"] | int | None) -> list[str]:
    sites = report.sites
    if fused is None:
        return []
    if fused == "all" and not sites:
        return ["no attention was found, so none is fused"]
    least = len(sites) if fused == "all" else fused
    if report.fused >= least:
        return []
    unfused = [_site_text(site) for site in sites if not site.fused]
    return [f"{report.fused} of {len(sites)} sites are fused, {least} were expected", *unfused]


def _site_text(site: Site) -> str:
    place = " ".join(text for text in (site.module, site.source) if text) or "unknown place"
    lines = [f"  site {site.id} at {place}: {site.op or 'not captured'}, mask {site.mask or 'unknown'}"]
    lines += [f"    {kernel}: {clause}" for kernel, clause in site.refusals]
    return "\n".join(lines)


def _graph_problems(report: Report, graphs: int | None) -> list[str]:
    found = sum(graph.kind != "backward" for graph in report.graphs)
    if graphs is None or found <= graphs:
        return []
    return [f"the call reached {found} graphs, at most {graphs} were expected: Dynamo breaks it into parts"]
