"""The command line: `sgl-npu doctor`, `explain TARGET`, `export TARGET`, `bench TARGET`, `demo`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgl_npu.compiler import bench as benching
from sgl_npu.compiler import demo as demonstration
from sgl_npu.compiler import export as exporting
from sgl_npu.compiler import own_process
from sgl_npu.compiler.cli_options import (
    BatchOption,
    DtypeOption,
    Json,
    LayersOption,
    OptionOption,
    PlatformOption,
    SeqOption,
    TargetArgument,
    asked,
)
from sgl_npu.compiler.coverage import CoverageError, expect
from sgl_npu.compiler.doctor import diagnose
from sgl_npu.compiler.explain import explain as explain_call
from sgl_npu.compiler.explain_target import (
    Setting,
    TargetError,
    load_target,
    parse_dtype,
    parse_options,
    telling_call_errors,
)
from sgl_npu.compiler.export_table import file_table, reasons
from sgl_npu.compiler.options import OptionsError
from sgl_npu.compiler.options import parse_options as checked_options
from sgl_npu.compiler.planned_ranks import planned_ranks
from sgl_npu.compiler.progress import steps
from sgl_npu.compiler.report import Report
from sgl_npu.compiler.timing import NoTensor

app = typer.Typer(
    help="Attention on Ascend NPUs for models that nobody prepared for it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    own_process.remember_start()
    app()


def _fail(message: object) -> typer.Exit:
    """One line on stderr; exit code 2."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what is emulated, and how to get what is missing."""
    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    console.print(f"sgl_npu {found['sgl_npu']}, Python {found['python']}, torch {found['torch']}")
    owner = {"emulated": "emulated on the CPU", "torch_npu": "torch_npu's own"}[found["npu_ops"]]
    console.print(f"NPU ops are {owner}")
    console.print(_rows("library version purpose", found["libraries"], "name", "version", "purpose"))
    console.print(_rows("platform kernel op state", found["kernels"], "platform", "kernel", "op", "state"))
    for remedy, missing in _by_remedy((*found["libraries"], *found["kernels"])).items():
        typer.echo(f"\n{remedy}:")
        for reason in missing:
            typer.echo(f"  {reason}")


def _by_remedy(rows: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """What is missing, under what would help: one remedy is often that of several."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:
            reason = f"{row.get('platform') or row['name']}: {row['reason']}"
            found[row["remedy"]] = list(dict.fromkeys([*found.get(row["remedy"], []), reason]))
    return found


def _rows(headers: str, rows: list[dict[str, Any]], *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers.split():
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(row[name] or "-" for name in names))
    return table


@app.command()
def explain(
    context: typer.Context,
    target: TargetArgument,
    platform: PlatformOption = "npu",
    seq: SeqOption = 4096,
    batch: BatchOption = 1,
    dtype: DtypeOption = "bf16",
    option: OptionOption = None,
    layers: LayersOption = None,
    as_json: Json = False,
    graph: Annotated[bool, typer.Option("--graph", help="print the final graphs as well")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="write the report as a page of its own as well")] = None,
    least: Annotated[
        str | None, typer.Option("--expect", help="exit with 1 if fewer are fused: all or a number")
    ] = None,
) -> None:
    """Report every attention of a model. Needs no NPU; a config needs no weights; nothing is downloaded.

    With --option parallel.ring=4 and the like no ranks are started: one process shows what each of them would get.
    """
    try:
        fused = _least(least)
        options = {"platform": platform, **parse_options(option or [])}
        setting = Setting(seq, batch, parse_dtype(dtype), layers, asked=asked(context))
        _check_page(html)
        ranks = checked_options(options).parallel.ranks
        with steps(2 if html is None else 3) as step:
            step(f"building {target}")
            found = load_target(target, setting)
            step(f"compiling {found.note}")
            with telling_call_errors(target, found), planned_ranks(ranks), found.mode, torch.no_grad():
                report = explain_call(found.model, *found.args, options=options, **found.kwargs)
            if html is not None:
                step(f"writing {html}")
                _write_page(report, html, found.note)
    except (TargetError, OptionsError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps({"target": target, "note": found.note, **report.to_dict()}, indent=2))
    else:
        typer.echo(f"{found.note}\n\n{report}" + (f"\n\n{report.graph}" if graph else ""))
    try:
        expect(report, fused=fused)
    except CoverageError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _least(text: str | None) -> Any:
    if text is None or text == "all":
        return text
    if text.isdigit():
        return int(text)
    raise TargetError(f"--expect {text}: should be all, or a number of attentions")


def _check_page(path: Path | None) -> None:
    """Before anything is compiled for it."""
    if path is not None and not path.parent.is_dir():
        raise TargetError(f"--html {path}: there is no folder {path.parent}; make it, or give a file elsewhere")


def _write_page(report: Report, path: Path, title: str) -> None:
    try:
        report.to_html(path, title)
    except OSError as error:
        raise _fail(
            f"--html {path}: {error.strerror}; give a file in a folder that exists and can be written to"
        ) from None
    typer.echo(f"wrote {path}", err=True)


Degree = Annotated[int | None, typer.Option(min=1, help="degree of sequence parallelism")]


@app.command()
def export(
    context: typer.Context,
    target: TargetArgument,
    out: Annotated[Path, typer.Option(help="folder for the files; made if need be")],
    platform: PlatformOption = "npu",
    seq: SeqOption = 4096,
    batch: BatchOption = 1,
    dtype: DtypeOption = "bf16",
    attention: Annotated[str | None, typer.Option(help="the option of the backend: auto, fa, sdpa, ...")] = None,
    ulysses: Degree = None,
    ring: Degree = None,
    kv_gather: Degree = None,
    option: OptionOption = None,
    layers: LayersOption = None,
    inner: Annotated[str, typer.Option(help=", ".join(exporting.CHOICES))] = "both",
    dynamic: Annotated[bool, typer.Option("--dynamic/--static", help="sizes of the inputs are symbols, or not")] = True,
    force: Annotated[bool, typer.Option("--force", help="write into a folder that is not empty")] = False,
    as_json: Json = False,
) -> None:
    """Write the rewritten graph, the GE graph and npugraph_ex's code of a model. Runs nothing; needs no NPU."""
    try:
        options = {"platform": platform, **parse_options(option or [])}
        if attention is not None:
            options["attention"] = attention
        degrees = {"ulysses": ulysses, "ring": ring, "kv_gather": kv_gather}
        if given := {name: degree for name, degree in degrees.items() if degree is not None}:
            options["parallel"] = {**options.get("parallel", {}), **given}
        request = exporting.Request(
            target, str(out), options, seq, batch, dtype, layers, dynamic, tuple(asked(context))
        )
        exporting.check_request(request, inner, force)
        with steps(exporting.STEPS) as step:
            manifest = exporting.export(request, inner, own_process.arguments(), step)
    except (TargetError, OptionsError, exporting.ExportError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps(manifest, indent=2))
    else:
        console = Console()
        console.print(Text(manifest["note"]))
        console.print(file_table(manifest))
    for reason in reasons(manifest):
        typer.echo(reason, err=True)
    if manifest["missing"]:
        raise typer.Exit(1)


@app.command(hidden=True)
def export_part(asked: Path, answered: Path) -> None:
    """One Ascend compiler's part of an export, in a process of its own."""
    exporting.answer(asked, answered)


@app.command()
def bench(
    context: typer.Context,
    target: TargetArgument,
    device: Annotated[
        str, typer.Option("--device", "--platform", help=f"{', '.join(benching.DEVICES)}: where it runs")
    ] = "cpu",
    seq: SeqOption = 512,
    batch: BatchOption = 1,
    dtype: DtypeOption = "bf16",
    option: OptionOption = None,
    layers: LayersOption = None,
    runs: Annotated[int, typer.Option(min=1, help="timed runs per variant")] = 10,
    as_json: Json = False,
) -> None:
    """Time a model eager, under Inductor and under sgl_npu. A config gets random weights, in this machine's memory."""
    try:
        options = parse_options(option or [])
        with steps(1 + benching.steps_of(runs)) as step:
            step(f"building {target}")
            setting = Setting(seq, batch, parse_dtype(dtype), layers, memory=True, asked=asked(context))
            found = load_target(target, setting)
            with telling_call_errors(target, found):
                result = benching.bench(found, device, options, runs, step)
    except (TargetError, OptionsError, NoTensor) as error:
        raise _fail(error) from None
    if as_json:
        timings = [asdict(timing) for timing in result.timings]
        plain = {"error": result.error, "scale": result.scale, "timings": timings, "speedups": result.speedups()}
        typer.echo(json.dumps({"target": target, "note": found.note, **plain, **result.report.to_dict()}, indent=2))
        return
    typer.echo(f"{found.note}\n\n{result.report}")
    _print_yardsticks(result)
    typer.echo(result.verdict())


@app.command()
def demo(
    as_json: Json = False,
    runs: Annotated[int, typer.Option(min=1, help="timed runs per variant")] = 5,
) -> None:
    """Compile a language model and a video transformer for CPU and emulated NPU: report, error, time."""
    measured = []
    parts = list(demonstration.run_demo(runs))
    with steps(len(parts)) as step:
        for name, part in parts:
            step(name)
            try:
                result = part()
            except demonstration.MissingLibrary as error:
                raise _fail(error) from None
            measured.append(_measurement_dict(result))
            if not as_json:
                _print_measurement(name, result)
    if as_json:
        typer.echo(json.dumps(measured, indent=2))
        return
    typer.echo("next: sgl-npu explain with a model of your own (. .venv/bin/activate first), and docs/tour.md")


def _measurement_dict(result: demonstration.Measurement) -> dict[str, Any]:
    report = result.report.to_dict()
    return {**asdict(replace(result, report=type(result.report)())), "report": report}


def _print_measurement(name: str, result: demonstration.Measurement) -> None:
    typer.echo(f"== {name}\n{result.report}")
    _print_yardsticks(result)


def _print_yardsticks(result: demonstration.Measurement | benching.Bench) -> None:
    typer.echo(f"error    {result.error:.2g} against eager (largest output {result.scale:.2g})")
    for timing in result.timings:
        median, fastest = 1e3 * timing.median, 1e3 * timing.fastest
        typer.echo(f"time     {timing.variant:<9} {median:8.1f} ms median of {timing.runs}, fastest {fastest:.1f}")
    typer.echo("")
