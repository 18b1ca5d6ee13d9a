"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TargetArgument = Annotated[
    str,
    typer.Argument(help="package.module:factory, or the folder or config.json of a transformers model"),
]
PlatformOption = Annotated[str, typer.Option(help="npu, cuda or cpu")]
SeqOption = Annotated[int, typer.Option(min=1, help="tokens per sequence, for a config")]
BatchOption = Annotated[int, typer.Option(min=1, help="sequences, for a config")]
DtypeOption = Annotated[str, typer.Option(help="bf16, fp16 or fp32, for a config")]
LayersOption = Annotated[int | None, typer.Option(help="keep so many layers of a config; all by default")]
OptionOption = Annotated[list[str] | None, typer.Option(help="key=value, an option of the backend")]
