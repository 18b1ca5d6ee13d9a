"""The files of an export, as a table, and how they are written from what a compilation gave.

They come from what torch_npu 2.13.0 returns: the code of `_CompiledFxGraph.get_code`, and the dump of the
`GeConcreteGraph` that is the `runner` of a compiled graph.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_npu.compiler.export_compile import Compiled, CompiledGraph
from sgl_npu.compiler.inner_ascend import Compilation

REWRITE = "eager"  # the inner compiler that takes the rewritten graph as it is
_LONGEST = 400  # characters of an error in the table of reasons


@dataclass(frozen=True)
class Artefact:
    """A file of one part, per graph: `write` puts each of `contents` at a path."""

    part: str
    file: str
    what: str
    contents: Callable[[CompiledGraph], Sequence[Any]]
    write: Callable[[Any, Path], None]


@dataclass(frozen=True)
class Entry:
    """A file that was written, or, with a reason in `missing`, was not."""

    file: str
    what: str
    part: str
    size: int = 0
    missing: str = ""


def write_text(text: str, path: Path) -> None:
    path.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


def _write_code(compilation: Compilation, path: Path) -> None:
    code = compilation.compiled.get_code()
    if not isinstance(code, str):
        raise ValueError("npugraph_ex generates no code under these inner_options")
    write_text(code, path)


def _write_dump(compilation: Compilation, path: Path) -> None:
    compilation.compiled.runner.dump(str(path))


def _texts(graph: CompiledGraph) -> list[str]:
    return [part.text for report in graph.reports for part in report.graphs]


def _compilations(graph: CompiledGraph) -> list[Compilation]:
    return graph.compilations


REPORT = ("report.txt", "every attention: where, what it became, or why not")
ARTEFACTS = (
    Artefact(
        REWRITE, "fx_graph.txt",
        "the rewritten FX graph",
        _texts, write_text,
    ),
    Artefact(
        "npugraph_ex", "npugraph_ex_code.py",
        "the code that npugraph_ex generates and captures",
        _compilations, _write_code,
    ),
    Artefact(
        "torchair", "ge_graph.py",
        "the GE graph, an operator per line",
        _compilations, _write_dump,
    ),
    Artefact(
        "torchair", "ge_graph.pbtxt",
        "the same graph for viewers such as Netron",
        _compilations, _write_dump,
    ),
)  # fmt: skip


def write_files(found: Compiled, part: str, out: Path) -> list[Entry]:
    """Every file of one part, and, if a graph failed to compile, the tracebacks."""
    entries = []
    if part == REWRITE:
        file, what = REPORT
        write_text(str(found.report), out / file)
        entries.append(Entry(file, what, part, size=(out / file).stat().st_size))
    entries += [entry for row in ARTEFACTS if row.part == part for entry in _written(row, found.graphs, out)]
    if failures := [graph.failure for graph in found.graphs if graph.failure is not None]:
        entries.append(failure_log(failures, part, out))
    return entries


def _written(artefact: Artefact, graphs: Sequence[CompiledGraph], out: Path) -> list[Entry]:
    """Files are numbered by Dynamo's graph where there are several, so that the numbers of all parts agree."""
    if not graphs:
        return [Entry(artefact.file, artefact.what, artefact.part, missing="no graph reached the backend")]
    entries = []
    for number, graph in enumerate(graphs):
        file = artefact.file if len(graphs) == 1 else _labelled(artefact.file, number)
        contents = artefact.contents(graph)
        for index, content in enumerate(contents):
            path = out / (file if len(contents) == 1 else _labelled(file, index))
            entries.append(_write(artefact, content, path))
        if graph.failure is not None:
            entries.append(Entry(file, artefact.what, artefact.part, missing=one_line(graph.failure)))
    return entries


def _write(artefact: Artefact, content: Any, path: Path) -> Entry:
    try:
        artefact.write(content, path)
        size = path.stat().st_size
        # torchair prints why a dump failed, and leaves an empty file.
        missing = "" if size else "the dump failed"
    except Exception as error:
        size, missing = 0, one_line(error)
    return Entry(path.name, artefact.what, artefact.part, size, missing)


def _labelled(file: str, number: int) -> str:
    stem, dot, suffix = file.partition(".")
    return f"{stem}_{number}{dot}{suffix}"


def one_line(error: BaseException) -> str:
    """The error that the others were raised for, as one line that is not too long."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' …'}"


def failure_log(failures: Sequence[Exception], part: str, out: Path) -> Entry:
    path = out / f"{part}_error.txt"
    write_text("\n".join("".join(traceback.format_exception(error)) for error in failures), path)
    return Entry(path.name, "where the compilation failed", part, size=path.stat().st_size)


def all_missing(part: str, reason: str) -> list[Entry]:
    return [Entry(row.file, row.what, part, missing=reason) for row in ARTEFACTS if row.part == part]
