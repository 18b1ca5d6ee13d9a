"""What a user may ask for: `Options` and `Parallel`, checked before anything is compiled."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from torch._dynamo.exc import ShortenTraceback
from torch.distributed.device_mesh import DeviceMesh

from sgl_npu.compiler.numbers import Real, Whole
from sgl_npu.lowering.sparse.setting import BLOCK_SPARSE, LASER, METHODS, RAIN_FUSION, SparseSetting
from sgl_npu.lowering.sparse.table import NPU_KERNELS, npu_kernel
from sgl_npu.lowering.sparse.token_grid import GridSetting

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

Platform = Literal["auto", "npu", "cuda", "cpu"]
Attention = Literal["auto", "fa", "sdpa", "laser_attn", "block_sparse_attn", "rain_fusion_attn"]
Shard = Literal["auto", "inputs", "none"]
Placement = Literal["auto", "contiguous", "zigzag"]
Positive = Annotated[Whole, Field(ge=1)]
Inner = Literal["auto", "inductor", "eager", "torchair", "npugraph_ex"]
SparseKernel = Literal["auto", "rain_fusion_attention", "npu_block_sparse_attention"]
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

    ulysses: Whole = Field(default=1, ge=1, description="ranks that exchange heads for sequence")
    ring: Whole = Field(default=1, ge=1, description="ranks that pass keys and values around")
    kv_gather: Whole = Field(default=1, ge=1, description="ranks that gather keys and values once")
    degree: Whole = Field(default=1, ge=1, description="ranks whose schemes are chosen by predicted bytes")
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
    max_gather: Real = Field(
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


class SparseConfig(BaseModel):
    """Settings of a sparse attention, `attention_config`. See docs/sparse.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: Real | None = Field(
        default=None, ge=0, lt=1, description="share of key blocks that a block of queries leaves out: 0.5"
    )
    skip_first_steps: Whole = Field(default=0, ge=0, description="denoising steps that stay dense")
    latent_shape: tuple[Positive, Positive, Positive] | None = Field(
        default=None, description="frames, height and width of the video in tokens; None: read off the graph"
    )
    patch_size: tuple[Positive, Positive, Positive] | None = Field(
        default=None, description="what the frames, height and width of the latent input are divided by to be tokens"
    )
    text_len: Whole | None = Field(
        default=None, ge=0, description="tokens of the sequence that are no video; None: as the graph says, else 0"
    )
    prefix: Whole | None = Field(default=None, ge=0, description="how many of those stand before the video; None: all")
    layers: tuple[str, ...] = Field(default=("*",), description="module paths that may be sparse, as globs")
    kernel: SparseKernel = Field(
        default="auto",
        description="rain fusion's kernel on an NPU, sgl-kernel-npu's or torch_npu's; auto: the first that is there",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> tuple[str, ...]:
        layers = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
        if not layers or not all(isinstance(layer, str) for layer in layers):
            raise PydanticCustomError(
                "layers",
                "Input should be a glob on module paths, as 'blocks.*.attn1', or a list of one or more; leave layers "
                "out for every module",
            )
        return layers


class Options(BaseModel):
    """Options of `torch.compile(model, backend="sgl_npu", options=...)`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    platform: Platform = Field(default="auto", description="whose kernels to use; auto: the device of the inputs")
    attention: Attention = Field(
        default="auto",
        description=(
            "auto or fa: the best dense kernel; sdpa: leave every attention to torch; laser_attn, block_sparse_attn, "
            "rain_fusion_attn: that kernel for the tokens of a video, dense ones elsewhere"
        ),
    )
    attention_config: SparseConfig = Field(default_factory=SparseConfig, description="settings of a sparse attention")
    parallel: Parallel = Field(default_factory=Parallel, description="degrees of sequence parallelism")
    preserve_empty_rows: bool = Field(
        default=True,
        strict=True,
        description="give queries without any key what the model's formula gives them; False: 0, which costs nothing",
    )
    merge_projections: bool = Field(
        default=False,
        strict=True,
        description=(
            "on NPUs, one product for query, key and value before a rotary embedding; it holds their weights in memory "
            "a second time"
        ),
    )
    inner: Inner = Field(default="auto", description="who compiles the rewritten graph; auto: the platform's own")
    inner_options: dict[str, Any] = Field(default_factory=dict, description="handed to the inner compiler as they are")
    mode: str = Field(default="default", description=f"torch.compile's mode, for Inductor: {', '.join(MODES)}")
    strict: bool = Field(
        default=False, strict=True, description="raise when a pass fails, instead of going on without it"
    )


_FIELDS: dict[str, type[BaseModel]] = {"parallel": Parallel, "attention_config": SparseConfig}
DEFAULT_SPARSITY = 0.5
_GRID_FIELDS = {"latent_shape", "patch_size", "text_len", "prefix"}


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
            fields = _FIELDS.get(str(item["loc"][0]) if len(item["loc"]) > 1 else "", Options).model_fields
            close = difflib.get_close_matches(str(item["loc"][-1]), fields, n=1)
            meant = ".".join([*map(str, item["loc"][:-1]), *close])
            hint = f"did you mean {meant!r}?" if close else f"known are {', '.join(fields)}"
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
    if options.merge_projections and options.platform in ("cpu", "cuda"):
        raise OptionsError(
            f"merge_projections = True is for an op of NPUs, but platform = {options.platform!r}; leave "
            "merge_projections out, or set platform to 'npu'"
        )
    _check_sparse(options)
    _check_degrees(options.parallel)


def _check_sparse(options: Options) -> None:
    config = options.attention_config
    given = ", ".join(f"{name} = {getattr(config, name)!r}" for name in sorted(config.model_fields_set))
    if options.attention not in METHODS:
        if given:
            raise OptionsError(
                f"attention_config: {given}: attention = {options.attention!r} has no settings; leave it out, or set "
                f"attention to {', '.join(map(repr, METHODS))}"
            )
        return
    if options.parallel.ranks > 1:
        raise OptionsError(
            f"attention = {options.attention!r} with parallel: a sparse kernel chooses its blocks from the whole "
            "sequence, which no rank has; leave parallel out, or set attention to 'auto'"
        )
    if options.attention == LASER and config.sparsity:
        raise OptionsError(
            f"attention_config: sparsity = {config.sparsity}: laser attention is dense; leave sparsity out, or set "
            f"attention to {BLOCK_SPARSE!r} or {RAIN_FUSION!r}"
        )
    if options.attention == LASER and (ignored := config.model_fields_set & _GRID_FIELDS):
        raise OptionsError(
            f"attention_config: {', '.join(f'{name} = {getattr(config, name)!r}' for name in sorted(ignored))}: laser "
            f"attention takes any sequence and no grid; leave it out, or set attention to {BLOCK_SPARSE!r} or "
            f"{RAIN_FUSION!r}"
        )
    if config.kernel not in ("auto", *NPU_KERNELS[options.attention]):
        raise OptionsError(
            f"attention_config: kernel = {config.kernel!r} computes rain fusion; leave kernel out, or set attention to "
            f"{RAIN_FUSION!r}"
        )
    if config.kernel != "auto" and options.platform in ("cpu", "cuda"):
        raise OptionsError(
            f"attention_config: kernel = {config.kernel!r} is one of NPUs, but platform = {options.platform!r}; leave "
            "kernel out, or set platform to 'npu'"
        )
    if config.latent_shape is not None and config.patch_size is not None:
        raise OptionsError(
            f"attention_config: {given}: latent_shape is in tokens, patch_size is for the latent input; give one"
        )
    text = config.text_len or 0
    if config.prefix is not None and config.prefix > text:
        raise OptionsError(
            f"attention_config: prefix = {config.prefix} of text_len = {text}: the prefix is a part of the "
            "text; make text_len the tokens before and behind the video"
        )
    if options.attention != LASER and config.sparsity == 0:
        warnings.warn(
            f"sgl_npu: attention_config: sparsity = 0.0 leaves nothing out; attention = {LASER!r} computes the same "
            "faster",
            stacklevel=2,
        )


def sparse_setting(options: Options, device_type: str) -> SparseSetting | None:
    """What the passes are told of a sparse attention; None for a dense one.

    Raises OptionsError where the kernels it needs are not installed. CPU tensors run on emulated ones.
    """
    if options.attention not in METHODS:
        return None
    config = options.attention_config
    try:
        kernel = npu_kernel(options.attention, config.kernel, installed=device_type == "npu")
    except LookupError as error:
        raise OptionsError(f"attention = {options.attention!r}: {error}") from None
    sparsity = DEFAULT_SPARSITY if config.sparsity is None else config.sparsity
    return SparseSetting(
        options.attention,
        _as_fraction(sparsity) if options.attention != LASER else Fraction(0),
        config.skip_first_steps,
        config.layers,
        GridSetting(config.latent_shape, config.patch_size, config.text_len, config.prefix),
        kernel,
    )


def _as_fraction(sparsity: float) -> Fraction:
    """To four digits, and under 1: block counts are multiplied with it, which must not leave int64."""
    return min(Fraction(str(sparsity)).limit_denominator(10_000), Fraction(9_999, 10_000))


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
