"""What a user may ask for: `Options` and `Parallel`, checked before anything is compiled."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch._dynamo.exc import ShortenTraceback
from torch.distributed.device_mesh import DeviceMesh

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

Platform = Literal["auto", "npu", "cuda", "cpu"]
Attention = Literal["auto", "fa", "sdpa", "laser_attn", "block_sparse_attn", "rain_fusion_attn"]
Shard = Literal["auto", "inputs", "none"]
Placement = Literal["auto", "contiguous", "zigzag"]
Inner = Literal["auto", "inductor", "eager", "torchair", "npugraph_ex"]
ASCEND_INNERS = ("npugraph_ex", "torchair")


class OptionsError(ShortenTraceback, ValueError):
    """A bad option: the message names the value, the rule and the remedy.

    Dynamo hands errors of its own base class to the user as they are; others it wraps in BackendCompilerFailed.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class Parallel(BaseModel):
    """How many ranks share one sequence, and how.

    The product of `ulysses` with `ring` or `kv_gather` is the number of ranks; `degree` gives that number and leaves
    the scheme of every attention to a cost model. See docs/parallelism.md.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    ulysses: int = Field(default=1, ge=1, strict=True, description="ranks that exchange heads for sequence")
    ring: int = Field(default=1, ge=1, strict=True, description="ranks that pass keys and values around")
    kv_gather: int = Field(default=1, ge=1, strict=True, description="ranks that gather keys and values once")
    degree: int = Field(default=1, ge=1, strict=True, description="ranks whose schemes are chosen by predicted bytes")
    shard: Shard = Field(
        default="auto",
        description="auto: through the whole graph; inputs: the caller's are one rank's rows; none: attention alone",
    )
    placement: Placement = Field(
        default="auto", description="rows of a rank; auto: zigzag for causal attention over ring or kv_gather"
    )
    mesh: DeviceMesh | None = Field(
        default=None,
        description="a DeviceMesh with dimensions named ring (or kv_gather), ulysses or degree; None: all ranks",
    )
    max_gather: float = Field(
        default=8.0, gt=0, description="how much may be gathered for ops without a rule, in bytes of q, k and v"
    )

    @property
    def blocks(self) -> tuple[str, int]:
        """The name and size of the axis that is not ulysses."""
        return next(
            ((name, getattr(self, name)) for name in ("ring", "kv_gather", "degree") if getattr(self, name) > 1),
            ("ring", 1),
        )

    @property
    def ranks(self) -> int:
        """How many ranks share one sequence."""
        return self.ulysses * self.ring * self.kv_gather * self.degree


class Options(BaseModel):
    """Options of `torch.compile(model, backend="sgl_npu", options=...)`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    platform: Platform = Field(default="auto", description="whose kernels to use; auto: the device of the inputs")
    attention: Attention = Field(
        default="auto",
        description="auto or fa: the best dense kernel; sdpa: leave every attention to torch",
    )
    attention_config: dict[str, Any] = Field(default_factory=dict, description="settings of a sparse attention")
    parallel: Parallel = Field(default_factory=Parallel, description="degrees of sequence parallelism")
    preserve_empty_rows: bool = Field(
        default=True,
        strict=True,
        description="give queries without any key what the model's formula gives them; False: 0, which costs nothing",
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
    if options.inner in ASCEND_INNERS and options.platform in ("cpu", "cuda"):
        raise OptionsError(
            f"inner = {options.inner!r} compiles for NPUs, but platform = {options.platform!r}; "
            "leave inner at 'auto' or set platform to 'npu'"
        )
    if options.attention.endswith("_attn"):
        raise OptionsError(
            f"attention = {options.attention!r}: sparse attention is not part of this version; "
            "use 'auto', 'fa' or 'sdpa'"
        )
    if options.attention_config:
        raise OptionsError(
            f"attention_config = {options.attention_config!r}: only sparse attention has settings; leave it out"
        )
    _check_degrees(options.parallel)


def _check_degrees(parallel: Parallel) -> None:
    degrees = {name: getattr(parallel, name) for name in ("ulysses", "ring", "kv_gather", "degree")}
    given = {name: value for name, value in degrees.items() if value > 1}
    text = ", ".join(f"{name} = {value}" for name, value in given.items())
    if "degree" in given and len(given) > 1:
        raise OptionsError(f"parallel: {text}: degree leaves the schemes to us; give it alone, or leave it out")
    if "ring" in given and "kv_gather" in given:
        raise OptionsError(
            f"parallel: {text}: a sequence is shared by a ring or by a gather; leave one of them at 1, "
            "and combine the other with ulysses"
        )
    if parallel.placement == "zigzag" and set(given) == {"ulysses"}:
        raise OptionsError(
            f"parallel: placement = 'zigzag' with {text}: ulysses computes whole sequences and needs no zigzag; "
            "leave placement at 'auto'"
        )


def refuse_mode(options: Options, inner: str) -> None:
    """Raise OptionsError if a mode is asked of an inner compiler that has none."""
    if options.mode != "default":
        raise OptionsError(f"mode = {options.mode!r}: modes are Inductor's, and inner is {inner!r}; leave mode out")


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
