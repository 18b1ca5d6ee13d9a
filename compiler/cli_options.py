"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from sgl_npu.compiler.explain_target import SIZES

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TargetArgument = Annotated[
    str,
    typer.Argument(
        help="the folder or config.json of a transformers model; or package.module:function, which returns model, "
        "(model, args), (model, kwargs) or (model, args, kwargs) and may take seq, batch, dtype and layers"
    ),
]
PlatformOption = Annotated[str, typer.Option(help="npu, cuda or cpu")]
SeqOption = Annotated[int, typer.Option(min=1, help="tokens per sequence, of a config or for a function that takes it")]
BatchOption = Annotated[int, typer.Option(min=1, help="sequences, of a config or for a function that takes it")]
DtypeOption = Annotated[str, typer.Option(help="bf16, fp16 or fp32, of a config or for a function that takes it")]
LayersOption = Annotated[
    int | None, typer.Option(help="keep so many layers of a config, all by default; or for a function that takes it")
]
OptionOption = Annotated[list[str] | None, typer.Option(help="key=value, an option of the backend")]


def asked(context: typer.Context) -> frozenset[str]:
    """The names of the sizes that the user gave: the others have their defaults."""
    sources = {name: context.get_parameter_source(name) for name in SIZES}
    return frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")
