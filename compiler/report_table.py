"""`str(report)`: the sites as a table, why kernels were refused, counts, graphs and seconds."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sgl_npu.compiler.report import Report, Site

WIDTH = 140

_COLUMNS = ("#", "where", "query", "key, value", "dtype", "mask", "op", "fused")

_WHOLE = ("#", "dtype", "op", "fused", "refused by")  # never broken over lines


def render(report: Report, width: int = WIDTH) -> str:
    """Plain text, no colour codes. Sites that differ by their layer's number alone share a row."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    if not report.graphs:
        return (
            "no graph reached the backend: the call ran no tensor operation under torch.compile, or compilation "
            "is disabled (torch.compiler.disable, set_stance, TORCHDYNAMO_DISABLE)"
        )
    rows = grouped(report.sites)
    if rows:
        console.print(_site_table(rows))
    refusals = _refusal_table(rows)
    if refusals.row_count:
        console.print(refusals)
    for line in summary(report):
        console.print(Text(line))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())


def grouped(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites in order of first appearance; those that differ by the numbers in their paths alone are together."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        facts = {**vars(site), "id": None, "module": _starred(site.module), "refusals": tuple(site.refusals)}
        groups.setdefault(tuple(facts.values()), []).append(site)
    return list(groups.values())


def _starred(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def where_text(sites: Sequence[Site]) -> str:
    """The module path with `*` where the paths differ, or the source line; then how many sites there are."""
    parts = [site.module.split(".") for site in sites]
    path = ".".join(names[0] if len(set(names)) == 1 else "*" for names in zip(*parts, strict=True))
    count = f"  x{len(sites)}" if len(sites) > 1 else ""
    return (path or sites[0].source or "-") + count


def _numbers(sites: Sequence[Site]) -> str:
    """0-5 for neighbours, 0-10/2 for every second, else 0, 3, 4."""
    ids = [site.id for site in sites]
    if len(ids) == 1:
        return str(ids[0])
    steps = {later - earlier for earlier, later in itertools.pairwise(ids)}
    if len(steps) > 1:
        return ", ".join(map(str, ids))
    step = steps.pop()
    return f"{ids[0]}-{ids[-1]}" if step == 1 else f"{ids[0]}-{ids[-1]}/{step}"


def _shape_text(shape: Sequence[str]) -> str:
    return f"({', '.join(shape)})" if shape else "-"


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, overflow="fold", no_wrap=header in _WHOLE)
    return table


def _site_table(rows: Sequence[Sequence[Site]]) -> Table:
    table = _table(*_COLUMNS)
    for sites in rows:
        site = sites[0]
        query, key, value = map(_shape_text, (site.query, site.key, site.value))
        cells = (
            _numbers(sites),
            where_text(sites),
            query,
            key if key == value else f"{key}, {value}",
            site.dtype or "-",
            site.mask or "-",
            site.op or "not captured",
            "yes" if site.fused else "no",
        )
        table.add_row(*map(Text, cells))
    return table


def _refusal_table(rows: Sequence[Sequence[Site]]) -> Table:
    table = _table("#", "refused by", "because")
    for sites in rows:
        for number, (kernel, clause) in enumerate(sites[0].refusals):
            table.add_row(*map(Text, ("" if number else _numbers(sites), kernel, clause)))
    return table


def summary(report: Report) -> list[str]:
    """Lines of counts, graphs and seconds."""
    sites = len(report.sites)
    ops = ", ".join(f"{count} x {op}" for op, count in report.counts().items())
    graphs = ", ".join(f"{graph.kind} ({graph.nodes} nodes)" for graph in report.graphs)
    seconds = ", ".join(f"{name} {spent:.2f}" for name, spent in report.seconds.items())
    backward = Counter(site.backward for site in report.sites if site.backward)
    lines = [
        f"platform {report.platform}, inner {report.inner}",
        f"sites    {report.fused} of {sites} fused: {ops}" if sites else "sites    no attention was found",
        f"graphs   {len(report.graphs)}: {graphs}",
        f"seconds  {seconds}",
    ]
    if backward:
        lines.insert(2, "backward " + ", ".join(f"{count} x {op}" for op, count in backward.items()))
    return lines
