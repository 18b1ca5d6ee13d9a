"""The command line: `sgl-npu doctor`, `sgl-npu explain TARGET`, `sgl-npu demo`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from sgl_npu.compiler import demo as demonstration
from sgl_npu.compiler.doctor import diagnose
from sgl_npu.compiler.explain import explain as explain_call
from sgl_npu.compiler.explain_target import Setting, TargetError, load_target, parse_dtype, parse_options
from sgl_npu.compiler.options import OptionsError

app = typer.Typer(
    help="Attention on Ascend NPUs for models that nobody prepared for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def main() -> None:
    app()


def _fail(message: object) -> typer.Exit:
    """One line on stderr; exit code 2."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def _status(text: str):
    return Console(stderr=True).status(text)


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
    notes = {
        f"{row.get('platform') or row['name']}: {row['reason']}; {row['remedy']}"
        for row in (*found["libraries"], *found["kernels"])
        if row["reason"]
    }
    for note in sorted(notes):
        typer.echo(note)


def _rows(headers: str, rows: list[dict[str, Any]], *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers.split():
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(row[name] or "-" for name in names))
    return table


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(help="package.module:factory, or the folder or config.json of a transformers model"),
    ],
    platform: Annotated[str, typer.Option(help="npu, cuda or cpu")] = "npu",
    seq: Annotated[int, typer.Option(min=1, help="tokens per sequence, for a config")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="sequences, for a config")] = 1,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32, for a config")] = "bf16",
    option: Annotated[list[str] | None, typer.Option(help="key=value, an option of the backend")] = None,
    layers: Annotated[int | None, typer.Option(help="keep so many layers of a config; all by default")] = None,
    as_json: Json = False,
    graph: Annotated[bool, typer.Option("--graph", help="print the final graphs as well")] = False,
) -> None:
    """Report every attention of a model. Needs no NPU; a config needs no weights; nothing is downloaded."""
    try:
        options = {"platform": platform, **parse_options(option or [])}
        setting = Setting(seq, batch, parse_dtype(dtype), layers)
        with _status(f"building {target}"):
            found = load_target(target, setting)
        with _status(f"compiling {found.note}"), found.mode, torch.no_grad():
            report = explain_call(found.model, *found.args, options=options, **found.kwargs)
    except (TargetError, OptionsError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps({"target": target, "note": found.note, **report.to_dict()}, indent=2))
        return
    typer.echo(f"{found.note}\n\n{report}")
    if graph:
        typer.echo(f"\n{report.graph}")


@app.command()
def demo(
    as_json: Json = False,
    runs: Annotated[int, typer.Option(min=1, help="timed runs per variant")] = 5,
) -> None:
    """Compile a language model and a video transformer for CPU and emulated NPU: report, error, time."""
    measured = []
    for name, step in demonstration.run_demo(runs):
        try:
            with _status(f"{name} …"):
                result = step()
        except demonstration.MissingLibrary as error:
            raise _fail(error) from None
        measured.append(_measurement_dict(result))
        if not as_json:
            _print_measurement(name, result)
    if as_json:
        typer.echo(json.dumps(measured, indent=2))


def _measurement_dict(result: demonstration.Measurement) -> dict[str, Any]:
    report = result.report.to_dict()
    return {**asdict(replace(result, report=type(result.report)())), "report": report}


def _print_measurement(name: str, result: demonstration.Measurement) -> None:
    typer.echo(f"== {name}\n{result.report}")
    typer.echo(f"error    {result.error:.2g} against eager (largest output {result.scale:.2g})")
    for timing in result.timings:
        median, fastest = 1e3 * timing.median, 1e3 * timing.fastest
        typer.echo(f"time     {timing.variant:<9} {median:8.1f} ms median of {timing.runs}, fastest {fastest:.1f}")
    typer.echo("")
