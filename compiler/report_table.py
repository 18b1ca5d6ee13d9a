"""`str(report)`: the sites as a table, how ranks share them, why kernels were refused, counts, graphs and seconds."""

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

from sgl_npu.passes.rotary import NOT_ROTATED

if TYPE_CHECKING:
    from sgl_npu.compiler.report import Report, Site
    from sgl_npu.passes.parallel import ParallelReport

WIDTH = 140

_COLUMNS = ("#", "where", "query", "key, value", "dtype", "mask", "op", "fused")

# Never broken over lines.
_WHOLE = ("#", "dtype", "op", "fused", "refused by", "density", "recall", "error", "scheme", "bytes per rank")


def render(report: Report, width: int = WIDTH) -> str:
    """Plain text, no colour codes. Sites that differ by their layer's number alone share a row."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    if not report.graphs:
        return (
            "no graph reached the backend: the call ran no tensor operation under torch.compile, or compilation "
            "is disabled (torch.compiler.disable, set_stance, TORCHDYNAMO_DISABLE)"
        )
    rows = grouped(report.sites)
    for sharing in dict.fromkeys(map(_sharing_text, report.parallel)):
        console.print(Text(sharing))
    for table in (
        _gather_table(report.parallel),
        _site_table(rows),
        _sparse_table(report, rows),
        _scheme_table(rows),
        _rotary_table(rows),
        _refusal_table(rows),
    ):
        if table.row_count:
            console.print(table)
    for line in summary(report):
        console.print(Text(line))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())


def grouped(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites in order of first appearance; those that differ by the numbers in their paths alone are together."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        facts = {**vars(site), "id": None, "module": _starred(site.module), "refusals": tuple(site.refusals)}
        facts["guards"] = tuple(map(_starred, site.guards))
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


_EMPTY_ROWS = {"possible": " (empty rows possible)", "some": " (some rows empty)"}


def _mask_text(site: Site) -> str:
    return (site.mask or "-") + _EMPTY_ROWS.get(site.empty_rows, "")


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
            _mask_text(site),
            site.op or "not captured",
            "yes" if site.fused else "no",
        )
        table.add_row(*map(Text, cells))
    return table


def _refusal_table(rows: Sequence[Sequence[Site]]) -> Table:
    table = _table("#", "refused by", "because")
    for sites in rows:
        for number, (kernel, clause) in enumerate(sites[0].refusals):
            reached = f" ({sites[0].deepest})" if kernel == "match" and sites[0].deepest else ""
            table.add_row(*map(Text, ("" if number else _numbers(sites), kernel, clause + reached)))
    return table


def _sparse_table(report: Report, rows: Sequence[Sequence[Site]]) -> Table:
    """What the sparse kernels leave out; where the call was run, how much of dense attention is left, by mean of heads.

    Sites that share a row have their lowest and highest number.
    """
    table = _table("#", "sparse", "density", "recall", "error")
    found = {x.site: x for x in report.sparse_quality()} if report.measures else {}
    for sites in rows:
        if sites[0].sparse:
            known = [found[site.id] for site in sites if site.id in found]
            numbers = ([x.density for x in known], [x.recall for x in known], [x.error for x in known])
            texts = map(_range_text, numbers, ("{:.3f}", "{:.3f}", "{:.2g}"))
            table.add_row(*map(Text, (_numbers(sites), sites[0].sparse, *texts)))
    return table


def _range_text(numbers: Sequence[float], form: str) -> str:
    return " to ".join(dict.fromkeys(form.format(end(numbers)) for end in (min, max))) if numbers else "-"


def _scheme_table(rows: Sequence[Sequence[Site]]) -> Table:
    """What one rank is predicted to send for one call of each attention."""
    table = _table("#", "scheme", "bytes per rank", "collectives")
    for sites in rows:
        if sites[0].scheme:
            table.add_row(
                *map(Text, (_numbers(sites), sites[0].scheme, _grouped_digits(sites[0].sent), sites[0].collectives))
            )
    return table


def _rotary_table(rows: Sequence[Sequence[Site]]) -> Table:
    """What became of the norms and rotary embeddings of queries and keys; what has none is left out."""
    table = _table("#", "before the attention")
    for sites in rows:
        if sites[0].rotary and not sites[0].rotary.endswith(NOT_ROTATED.reason):
            table.add_row(Text(_numbers(sites)), Text(sites[0].rotary))
    return table


def _sharing_text(sharing: ParallelReport) -> str:
    """The grid of ranks, or why they share nothing."""
    if sharing.refused:
        return f"not sharded over {sharing.grid} ranks (blocks x ulysses): {sharing.refused}"
    return f"sequence sharded over {sharing.grid} ranks (blocks x ulysses)"


def _gather_table(parts: Sequence[ParallelReport]) -> Table:
    """Tensors that are gathered for ops without a sharding rule."""
    table = _table("gathered for", "shape", "bytes")
    for (op, shape, size), count in Counter(gather for part in parts for gather in part.gathers).items():
        times = f"  x{count}" if count > 1 else ""
        table.add_row(*map(Text, (op + times, shape.replace("'", ""), _grouped_digits(size))))
    return table


def _grouped_digits(number: str) -> str:
    """1234567 as 1,234,567; a formula as it is."""
    return f"{int(number):,}" if number.isdigit() else number


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
    guards = dict.fromkeys(_starred(name) for site in report.sites for name in site.guards)
    if guards:
        lines.insert(2, f"buffers  compared at every call: {', '.join(guards)}")
    if backward:
        lines.insert(2, "backward " + ", ".join(f"{count} x {op}" for op, count in backward.items()))
    return lines
