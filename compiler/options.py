"""What a user may ask for: `Options` and `Parallel`, checked before anything is compiled."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch._dynamo.exc import ShortenTraceback

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

Platform = Literal["auto", "npu", "cuda", "cpu"]
Attention = Literal["auto", "fa", "sdpa", "laser_attn", "block_sparse_attn", "rain_fusion_attn"]
Inner = Literal["auto", "inductor", "eager", "torchair", "npugraph_ex"]


class OptionsError(ShortenTraceback, ValueError):
    """A bad option: the message names the value, the rule and the remedy.

    Dynamo hands errors of its own base class to the user as they are; others it wraps in BackendCompilerFailed.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class Parallel(BaseModel):
    """Degrees of sequence parallelism. Their product is the number of ranks that share one sequence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ulysses: int = Field(default=1, ge=1, strict=True, description="ranks that exchange heads for sequence")
    ring: int = Field(default=1, ge=1, strict=True, description="ranks that pass keys and values around")
    kv_gather: int = Field(default=1, ge=1, strict=True, description="ranks that gather keys and values once")


class Options(BaseModel):
    """Options of `torch.compile(model, backend="sgl_npu", options=...)`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    platform: Platform = Field(default="auto", description="whose kernels to use; auto: the device of the inputs")
    attention: Attention = Field(
        default="auto",
        description="auto or fa: the best dense kernel; sdpa: leave scaled_dot_product_attention alone",
    )
    attention_config: dict[str, Any] = Field(default_factory=dict, description="settings of a sparse attention")
    parallel: Parallel = Field(default_factory=Parallel, description="degrees of sequence parallelism")
    formulas: bool = Field(
        default=False,
        strict=True,
        description="match attention written out as matmul, softmax, matmul too; a preview, see the README",
    )
    inner: Inner = Field(default="auto", description="who compiles the rewritten graph; auto: the platform's own")
    inner_options: dict[str, Any] = Field(default_factory=dict, description="handed to the inner compiler as they are")
    mode: str = Field(default="default", description=f"torch.compile's mode, for Inductor: {', '.join(MODES)}")
    strict: bool = Field(
        default=False, strict=True, description="raise when a pass fails, instead of going on without it"
    )


def parse_options(options: Mapping[str, Any] | Options | None, mode: str | None = None) -> Options:
    """Check what the user passed to torch.compile. Raises OptionsError with one line per mistake."""
    if isinstance(options, Options):
        parsed = options
    elif options is None or isinstance(options, Mapping):
        try:
            parsed = Options(**(options or {}))
        except (ValidationError, TypeError) as error:
            raise OptionsError(_explain(error)) from None
    else:
        raise OptionsError(f"options = {options!r}: expected a dict or sgl_npu.Options, got {type(options).__name__}")
    if mode is not None:
        parsed = parsed.model_copy(update={"mode": mode})
    _check_combinations(parsed)
    return parsed


def _explain(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return f"an option name is not a string ({error}); known are {', '.join(Options.model_fields)}"
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            fields = Parallel.model_fields if item["loc"][0] == "parallel" else Options.model_fields
            close = difflib.get_close_matches(str(item["loc"][-1]), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(fields)}"
            lines.append(f"unknown option {path!r}: {hint}")
        else:
            lines.append(f"{path} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(lines)


def _check_combinations(options: Options) -> None:
    """Rules between options, and options whose implementation this version does not have."""
    if options.mode not in MODES:
        raise OptionsError(f"mode = {options.mode!r}: should be one of {', '.join(MODES)}")
    if options.inner in ("torchair", "npugraph_ex") and options.platform in ("cpu", "cuda"):
        raise OptionsError(
            f"inner = {options.inner!r} compiles for NPUs, but platform = {options.platform!r}; "
            "leave inner at 'auto' or set platform to 'npu'"
        )
    if options.attention.endswith("_attn"):
        raise OptionsError(
            f"attention = {options.attention!r}: sparse attention is not part of this version; "
            "use 'auto', 'fa' or 'sdpa'"
        )
    if options.formulas and options.attention == "sdpa":
        raise OptionsError("formulas = True and attention = 'sdpa' contradict each other; leave one of them out")
    if options.attention_config:
        raise OptionsError(
            f"attention_config = {options.attention_config!r}: only sparse attention has settings; leave it out"
        )
    if options.parallel != Parallel():
        raise OptionsError(
            f"parallel = {options.parallel!r}: sequence parallelism is not part of this version; "
            "leave every degree at 1"
        )


def resolve_platform(options: Options, device: torch.device) -> str:
    """The platform whose kernel table serves tensors on `device`. Raises OptionsError when they cannot go together."""
    if options.platform == "auto":
        return device.type if device.type in ("npu", "cuda") else "cpu"
    if options.platform == "npu" and device.type in ("npu", "cpu"):
        return "npu"
    if options.platform != device.type:
        raise OptionsError(
            f"platform = {options.platform!r}, but the inputs are on {device.type!r}; move the model and its inputs to "
            f"{options.platform!r}, or leave platform at 'auto'"
        )
    return options.platform
