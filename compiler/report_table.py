"""`str(report)`: the sites as a table, how ranks share them, why kernels were refused, counts, graphs and seconds."""

from __future__ import annotations

import io
import itertools
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
TABLES_FROM = 120  # columns; in fewer, each row of sites is a block

_COLUMNS = ("#", "where", "query", "key, value", "dtype", "mask", "op", "fused")

# Never broken over lines.
_WHOLE = ("#", "dtype", "op", "fused", "refused by", "density", "recall", "error", "scheme", "bytes per rank")


def terminal_width() -> int:
    """The columns of the terminal that is written to, `WIDTH` where it is none: files and pipes get the same always."""
    return shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout is not None and sys.stdout.isatty() else WIDTH


def render(report: Report, width: int = WIDTH) -> str:
    """Plain text, no colour codes. Sites that differ by their layer's number alone share a row.

    Tables, or in less than `TABLES_FROM` columns a block for each row of sites.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    if not report.graphs:
        return (
            "no graph reached the backend: the call ran no tensor operation under torch.compile, or compilation "
            "is disabled (torch.compiler.disable, set_stance, TORCHDYNAMO_DISABLE)"
        )
    rows = grouped(report.sites)
    for sharing in dict.fromkeys(map(_sharing_text, report.parallel)):
        console.print(Text(sharing))
    parts = [
        _site_part(rows),
        _sparse_part(report, rows),
        _scheme_part(rows),
        _rotary_part(rows),
        _refusal_part(rows),
    ]
    for table in _tables([_gather_part(report.parallel)]):
        console.print(table)
    for each in _blocks(rows, parts) if rows and width < TABLES_FROM else _tables(parts):
        console.print(each)
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


@dataclass
class Part:
    """A table of the report: headers of its columns, and rows of cells, each with the group of sites that it is of.

    The first column of what is about sites has their numbers.
    """

    headers: tuple[str, ...]
    rows: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    def add(self, group: int, *cells: str) -> None:
        self.rows.append((group, cells))


def _tables(parts: Iterable[Part]) -> Iterator[Table]:
    return (_table(part) for part in parts if part.rows)


def _table(part: Part) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in part.headers:
        table.add_column(header, overflow="fold", no_wrap=header in _WHOLE)
    last = None
    for group, (first, *cells) in part.rows:
        again = group == last and part.headers[0] == "#"
        table.add_row(*map(Text, ("" if again else first, *cells)))
        last = group
    return table


def _blocks(rows: Sequence[Sequence[Site]], parts: Sequence[Part]) -> Iterator[Text | Table]:
    """A title for every row of sites, and below it what all tables say of it, a line for each cell."""
    labels = max((len(header) for part in parts if part.rows for header in part.headers[1:]), default=0)
    for number, sites in enumerate(rows):
        yield Text(f"\n{_numbers(sites)}  {where_text(sites)}")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=2)
        grid.add_column(no_wrap=True, min_width=labels)
        grid.add_column(overflow="fold")
        for part in parts:
            for group, cells in part.rows:
                named = zip(part.headers[1:], cells[1:], strict=True)
                for header, cell in named:
                    if group == number and cell and header != "where":
                        grid.add_row("", Text(header), Text(cell))
        yield grid
    yield Text("")


def _site_part(rows: Sequence[Sequence[Site]]) -> Part:
    part = Part(_COLUMNS)
    for group, sites in enumerate(rows):
        site = sites[0]
        query, key, value = map(_shape_text, (site.query, site.key, site.value))
        part.add(
            group,
            _numbers(sites),
            where_text(sites),
            query,
            key if key == value else f"{key}, {value}",
            site.dtype or "-",
            _mask_text(site),
            site.op or "not captured",
            "yes" if site.fused else "no",
        )
    return part


def _refusal_part(rows: Sequence[Sequence[Site]]) -> Part:
    part = Part(("#", "refused by", "because"))
    for group, sites in enumerate(rows):
        for kernel, clause in sites[0].refusals:
            reached = f" ({sites[0].deepest})" if kernel == "match" and sites[0].deepest else ""
            part.add(group, _numbers(sites), kernel, clause + reached)
    return part


def _sparse_part(report: Report, rows: Sequence[Sequence[Site]]) -> Part:
    """What the sparse kernels leave out; where the call was run, how much of dense attention is left, by mean of heads.

    Sites that share a row have their lowest and highest number.
    """
    part = Part(("#", "sparse", "density", "recall", "error"))
    found = {x.site: x for x in report.sparse_quality()} if report.measures else {}
    for group, sites in enumerate(rows):
        if sites[0].sparse:
            known = [found[site.id] for site in sites if site.id in found]
            numbers = ([x.density for x in known], [x.recall for x in known], [x.error for x in known])
            texts = map(_range_text, numbers, ("{:.3f}", "{:.3f}", "{:.2g}"))
            part.add(group, _numbers(sites), sites[0].sparse, *texts)
    return part


def _range_text(numbers: Sequence[float], form: str) -> str:
    return " to ".join(dict.fromkeys(form.format(end(numbers)) for end in (min, max))) if numbers else "-"


def _scheme_part(rows: Sequence[Sequence[Site]]) -> Part:
    """What one rank is predicted to send for one call of each attention."""
    part = Part(("#", "scheme", "bytes per rank", "collectives"))
    for group, sites in enumerate(rows):
        if sites[0].scheme:
            part.add(group, _numbers(sites), sites[0].scheme, _grouped_digits(sites[0].sent), sites[0].collectives)
    return part


def _rotary_part(rows: Sequence[Sequence[Site]]) -> Part:
    """What became of the norms and rotary embeddings of queries and keys; what has none is left out."""
    part = Part(("#", "before the attention"))
    for group, sites in enumerate(rows):
        if sites[0].rotary and not sites[0].rotary.endswith(NOT_ROTATED.reason):
            part.add(group, _numbers(sites), sites[0].rotary)
    return part


def _sharing_text(sharing: ParallelReport) -> str:
    """The grid of ranks, or why they share nothing."""
    if sharing.refused:
        return f"not sharded over {sharing.grid} ranks (blocks x ulysses): {sharing.refused}"
    return f"sequence sharded over {sharing.grid} ranks (blocks x ulysses)"


def _gather_part(parts: Sequence[ParallelReport]) -> Part:
    """Tensors that are gathered for ops without a sharding rule."""
    part = Part(("gathered for", "shape", "bytes"))
    found = Counter(gather for one in parts for gather in one.gathers)
    for (op, shape, size), count in found.items():
        part.add(0, op + (f"  x{count}" if count > 1 else ""), shape.replace("'", ""), _grouped_digits(size))
    return part


def _grouped_digits(number: str) -> str:
    """1234567 as 1,234,567; a formula as it is."""
    return f"{int(number):,}" if number.isdigit() else number


_WHOLES = ("passes", "inner", "total")  # of a report's seconds, what its other steps are parts of
_LARGEST = 3


def _seconds_text(seconds: Mapping[str, float]) -> str:
    """The sums, and the steps that took longest; all of them are in the report's data and in its page."""
    wholes = {name: seconds[name] for name in _WHOLES if name in seconds}
    steps = {name: spent for name, spent in seconds.items() if name not in _WHOLES and spent >= 0.005}
    largest = dict(sorted(steps.items(), key=lambda step: -step[1])[:_LARGEST])
    texts = (", ".join(f"{name} {spent:.2f}" for name, spent in found.items()) for found in (wholes, largest))
    return "; most in ".join(text for text in texts if text) or "none"


def summary(report: Report) -> list[str]:
    """Lines of counts, graphs and seconds."""
    sites = len(report.sites)
    ops = ", ".join(f"{count} x {op}" for op, count in report.counts().items())
    graphs = ", ".join(f"{graph.kind} ({graph.nodes} nodes)" for graph in report.graphs)
    backward = Counter(site.backward for site in report.sites if site.backward)
    lines = [
        f"platform {report.platform}, inner {report.inner}",
        f"sites    {report.fused} of {sites} fused: {ops}" if sites else "sites    no attention was found",
        f"graphs   {len(report.graphs)}: {graphs}",
        f"seconds  {_seconds_text(report.seconds)}",
    ]
    guards = dict.fromkeys(_starred(name) for site in report.sites for name in site.guards)
    if guards:
        lines.insert(2, f"buffers  compared at every call: {', '.join(guards)}")
    if backward:
        lines.insert(2, "backward " + ", ".join(f"{count} x {op}" for op, count in backward.items()))
    return lines
