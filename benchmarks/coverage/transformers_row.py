"""A row of the tables of transformers families, and the cases it stands for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.coverage.case import Built, Case, Setting
from benchmarks.coverage.inputs import by_signature, decoding, padded
from benchmarks.coverage.tiny import tiny_config

EAGER, BOTH = ("eager",), ("eager", "sdpa")
PAD, DECODE, PAD_DECODE = ("pad",), ("decode",), ("pad", "decode")
Inputs = Callable[[Any, Setting], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One family: its model class, what its tiny config needs beyond the usual sizes, and its sites.

    `model` is a name in transformers or "module:class". `inputs` default to what the forward's signature asks for.
    """

    family: str
    model: str
    sites: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    inputs: Inputs = by_signature
    spellings: tuple[str, ...] = EAGER
    variants: tuple[str, ...] = ()
    negative: bool = False


def cases(rows: Iterable[Row]) -> list[Case]:
    return [
        Case("hf", row.family, spelling, _builder(row, spelling, variant), variant, row.sites, row.negative)
        for row in rows
        for spelling in row.spellings
        for variant in ("", *row.variants)
    ]


def _builder(row: Row, spelling: str, variant: str) -> Callable[[Setting], Built]:
    def build(setting: Setting) -> Built:
        import transformers

        transformers.logging.set_verbosity_error()
        model_class = _model_class(row.model)
        torch.manual_seed(0)
        config = tiny_config(model_class.config_class, **row.config)
        model = model_class._from_config(config, attn_implementation=spelling).eval()
        fill_zeros(model)
        model = model.to(setting.dtype)
        if variant == "decode":
            kwargs = decoding(model, setting)
        else:
            kwargs = row.inputs(model, setting)
            if variant == "pad":
                kwargs = padded(model, setting, kwargs)
        valid = kwargs["attention_mask"].bool() if variant == "pad" and "decoder_input_ids" not in kwargs else None
        return Built(model, {name: _cast(value, setting.dtype) for name, value in kwargs.items()}, valid)

    return build


def _model_class(name: str) -> Any:
    import transformers

    module, _, member = name.rpartition(":")
    return getattr(importlib.import_module(module) if module else transformers, member)


def fill_zeros(model: torch.nn.Module) -> None:
    """Random values where the initialisation leaves zeros or nothing: biases, gates, sinks and tables shall matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (not parameter.any() or not torch.isfinite(parameter).all()):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.dtype is torch.float32
    return value.to(dtype) if is_float else value
