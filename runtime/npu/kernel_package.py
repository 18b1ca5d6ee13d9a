"""The fused kernels of sgl-kernel-npu, found by name and schema.

Its releases renamed kernels, moved them between namespaces and reordered arguments. Every form that was read in a
release is a row; a kernel that has another schema is refused, never called by position.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

BUILD = "on an Ascend machine with the CANN toolkit: build the wheel from github.com/sgl-project/sgl-kernel-npu"
# Wheels built from sgl-kernel-npu, by the module to import, and the argument of its build.sh that builds them.
PACKAGES = {"sgl_kernel_npu": "kernels", "attentions": "attentions"}
# The package whose import defines the torch ops of a namespace.
_DEFINED_BY = {"npu": "sgl_kernel_npu", "attentions": "attentions"}

Call = Callable[[Callable, Mapping[str, Any]], Any]


class KernelUnavailable(RuntimeError):
    """A kernel of sgl-kernel-npu is absent or has another schema; the message says what to install."""


def _by_name(function: Callable, arguments: Mapping[str, Any]) -> Any:
    return function(**arguments)


def _first_of_two(function: Callable, arguments: Mapping[str, Any]) -> Any:
    return function(**arguments)[0]


_NEWER_ROPE = "install a release of sgl_kernel_npu since 2026-05-27"


def _whole_heads(function: Callable, arguments: Mapping[str, Any]) -> Any:
    columns, head_dim = arguments["sin"].shape[-1], arguments["head_dim"]
    if columns != head_dim:
        raise KernelUnavailable(
            f"split_qkv_rmsnorm_rope: sin has {columns} columns and head_dim is {head_dim}; the installed release may"
            f" only rotate whole heads; {_NEWER_ROPE}"
        )
    if not arguments["is_neox_style"]:
        raise KernelUnavailable(
            f"split_qkv_rmsnorm_rope: is_neox_style = False; the installed release only rotates halves; {_NEWER_ROPE}"
        )
    return function(**{name: value for name, value in arguments.items() if name != "is_neox_style"})


def _whole_normalised_heads(function: Callable, arguments: Mapping[str, Any]) -> Any:
    if arguments["eps"] is None:
        raise KernelUnavailable(
            f"split_qkv_rmsnorm_rope: eps = None; the installed release always normalises; {_NEWER_ROPE}"
        )
    return _whole_heads(function, arguments)


@dataclass(frozen=True)
class Form:
    """What one span of releases defines.

    `target` is a torch op "namespace::name" or a function "module:name"; `signature` is the schema after the name, or
    the function's parameters. `call` hands over the arguments of our op, named as in the newest form.
    """

    target: str
    signature: str
    releases: str
    source: str
    call: Call = _by_name

    @property
    def is_op(self) -> bool:
        return "::" in self.target

    @property
    def package(self) -> str:
        if self.is_op:
            return _DEFINED_BY[self.target.partition("::")[0]]
        return self.target.partition(".")[0]


_LASER = (
    "(Tensor query, Tensor key, Tensor value, Tensor? atten_mask=None, Tensor? alibi_mask=None,"
    " Tensor? drop_mask=None, float scale_value=1.0, int head_num=2, str input_layout='BNSD', float keep_prob=1.0,"
    " int pre_tokens=2147483647, int next_tokens=1, bool is_highPrecision=True) -> (Tensor, Tensor)"
)
_BLOCK_SPARSE = (
    "(Tensor query, Tensor key, Tensor value, Tensor sparse_mask, Tensor sparse_count_table,"
    " str input_layout='BNSD', int sparse_size=128, int num_heads=1, int num_key_value_heads=1, float scale_value=1,"
    " bool causal=True, int inner_precise=1, int pre_tokens=214748647, int next_tokens=0,"
    " int[]? actual_seq_lengths=None, int[]? actual_seq_lengths_kv=None) -> "
)
_ESTIMATE = (
    "(Tensor query, Tensor key, int[]? actual_seq_lengths=None, int[]? actual_seq_lengths_kv=None,"
    " str input_layout='BNSD', int stride=8, int sparse_size=128, int num_heads=1, int num_key_value_heads=1,"
    " float scale_value=1, float threshold=1, bool causal=True, bool keep_sink=True, bool keep_recent=True,"
    " float row_sparse=1) -> (Tensor, Tensor)"
)
_RAIN_FUSION = (
    "(Tensor query, Tensor key, Tensor value, Tensor select_idx, Tensor select_num_idx, int[] blockshape,"
    " Tensor? attn_mask=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, Tensor? block_table=None,"
    " str q_input_layout='TND', str kv_input_layout='TND', int head_num=1, int mask_type=0, float scale=1.0,"
    " int inner_precise=1, int block_size=0) -> (Tensor, Tensor)"
)
_SPLIT_ROPE = "sgl_kernel_npu.norm.split_qkv_rmsnorm_rope:split_qkv_rmsnorm_rope"
_SPLIT_MROPE = "sgl_kernel_npu.norm.split_qkv_rmsnorm_mrope:triton_split_qkv_rmsnorm_mrope"
_SIZES = "q_hidden_size, kv_hidden_size, head_dim"

_MERGED = "csrc/pytorch_extensions.cpp @7f12e8f0"
_PLUGIN = "csrc/attentions/csrc/plugin/register_ops.cpp"
_PLUGIN_NEW, _PLUGIN_OLD = f"{_PLUGIN} @3f03db0c", f"{_PLUGIN} @4d1ad10e"
_PYTHON = "python/sgl_kernel_npu/sgl_kernel_npu/norm"

# Our name of the kernel -> its forms, newest first.
KERNELS: dict[str, tuple[Form, ...]] = {
    "laser_attention": (
        Form("npu::laser_attn", _LASER, "after 2026-08-21", _MERGED),
        Form("attentions::la", _LASER, "2026-05-06 to 2026-08-21", _PLUGIN_OLD),
    ),
    "block_sparse_attention": (
        Form("npu::ada_block_sparse_attention", _BLOCK_SPARSE + "Tensor", "after 2026-08-21", _MERGED),
        Form(
            "npu::ada_block_sparse_attention",
            _BLOCK_SPARSE + "(Tensor, Tensor)",
            "after 2026-08-21",
            "docs/attention_kernels.md @7f12e8f0, which returns the log-sum-exp as well",
            _first_of_two,
        ),
        Form(
            "attentions::ada_block_sparse_attention",
            _BLOCK_SPARSE + "Tensor",
            "2026-08-12 to 2026-08-21",
            _PLUGIN_NEW,
        ),
        Form("attentions::block_sparse_attention", _BLOCK_SPARSE + "Tensor", "2026-05-06 to 2026-08-11", _PLUGIN_OLD),
    ),
    "sparse_block_estimate": (
        Form("npu::sparse_block_estimate", _ESTIMATE, "after 2026-08-21", _MERGED),
        Form("attentions::sparse_block_estimate", _ESTIMATE, "2026-05-06 to 2026-08-21", _PLUGIN_OLD),
    ),
    "rain_fusion_attention": (
        # docs/attentions.md @901c672a: removed together with the package, without a successor.
        Form("attentions::rainfusionattention", _RAIN_FUSION, "2026-05-06 to 2026-08-21", _PLUGIN_OLD),
    ),
    "split_qkv_rmsnorm_rope": (
        Form(
            _SPLIT_ROPE,
            f"(input, sin, cos, {_SIZES}, eps, q_weight, k_weight, q_bias, k_bias, is_neox_style)",
            "since 2026-05-27",
            f"{_PYTHON}/split_qkv_rmsnorm_rope.py @bc38689a",
        ),
        # Releases of this form before 2026-03-05 rotate whole heads and read sin as if it had head_dim columns.
        Form(
            _SPLIT_ROPE,
            f"(input, sin, cos, {_SIZES}, eps, q_weight, k_weight, q_bias, k_bias)",
            "2025-12-26 to 2026-05-26",
            f"{_PYTHON}/split_qkv_rmsnorm_rope.py @c7fcd82b",
            _whole_heads,
        ),
        Form(
            _SPLIT_ROPE,
            f"(input, sin, cos, q_weight, k_weight, {_SIZES}, eps, q_bias, k_bias)",
            "2025-11-19 to 2025-12-25",
            f"{_PYTHON}/split_qkv_rmsnorm_rope.py @33753fc0",
            _whole_normalised_heads,
        ),
    ),
    "split_qkv_rmsnorm_mrope": (
        Form(
            _SPLIT_MROPE,
            "(qkv, q_weight, k_weight, cos_sin, num_q_heads, num_kv_heads, head_size, eps, mrope_section,"
            " is_interleaved, rope_dim, q_bias, k_bias, has_gate)",
            "since 2026-08-21",
            f"{_PYTHON}/split_qkv_rmsnorm_mrope.py @ee334193",
        ),
    ),
}


@dataclass(frozen=True)
class Resolved:
    """A kernel that is there in a known form. Call it with arguments by name."""

    name: str
    form: Form
    function: Callable

    def __call__(self, **arguments: Any) -> Any:
        return self.form.call(self.function, arguments)

    @property
    def version(self) -> str | None:
        """Version of the installed package; None if it was not installed as a package."""
        try:
            return importlib.metadata.version(self.form.package)
        except importlib.metadata.PackageNotFoundError:
            return None


@dataclass(frozen=True)
class Absent:
    """Why a kernel cannot be called, and what to install."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def resolve(name: str) -> Resolved | Absent:
    """The kernel in the newest known form that this process has, or why there is none.

    Imports the packages that define it, where they are installed.
    """
    seen: list[str] = []
    for target in dict.fromkeys(form.target for form in KERNELS[name]):
        forms = [form for form in KERNELS[name] if form.target == target]
        found, note = _find(forms[0])
        for function, signature in found:
            match = next((form for form in forms if normalise(form.signature) == signature), None)
            if match is not None:
                return Resolved(name, match, function)
            expected = " or ".join(normalise(form.signature) for form in forms)
            seen.append(f"{target} has the signature {signature}, expected {expected}")
        if not found and note:
            seen.append(note)
    targets = ", ".join(dict.fromkeys(form.target for form in KERNELS[name]))
    return Absent(f"{name}: {'; '.join(seen) or f'none of {targets} is there'}", _remedy(name))


def require(name: str) -> Resolved:
    """The kernel, or KernelUnavailable with the sentence of `resolve`."""
    found = _resolved.get(name)
    if found is None:
        answer = resolve(name)
        if isinstance(answer, Absent):
            raise KernelUnavailable(str(answer))
        found = _resolved[name] = answer
    return found


# What was found stays found; what is absent may be installed and imported later.
_resolved: dict[str, Resolved] = {}


def _remedy(name: str) -> str:
    releases: dict[str, list[str]] = {}
    for form in KERNELS[name]:
        releases.setdefault(form.package, []).append(form.releases)
    choices = (
        f"./build.sh -a {PACKAGES[package]} (wheel {package}, releases {' and '.join(dict.fromkeys(spans))})"
        for package, spans in releases.items()
    )
    return f"{BUILD} with {' or '.join(choices)}"


def _find(form: Form) -> tuple[list[tuple[Callable, str]], str]:
    """Every overload or function behind a form's target with its normalised signature, and what went wrong."""
    if form.is_op:
        found = _overloads(form.target)
        if found:
            return found, ""
        _, note = _import(form.package)
        return _overloads(form.target), note
    name, _, attribute = form.target.partition(":")
    module, note = _import(name)
    function = getattr(module, attribute, None)
    if function is None:
        return [], note
    return [(function, normalise(f"({', '.join(inspect.signature(function).parameters)})"))], ""


def _overloads(target: str) -> list[tuple[Callable, str]]:
    namespace, _, name = target.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return []
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return [(overload, normalise(str(overload._schema))) for overload in overloads]


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why: an empty reason if it is not installed."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None, ""
        return None, f"the import of {name} fails: {error}"
    except Exception as error:
        return None, f"the import of {name} fails: {error}"


_PARAMETER_DEFAULT = re.compile(r"=(\"[^\"]*\"|'[^']*'|\[[^\]]*\]|[^,)]*)")


def normalise(signature: str) -> str:
    """A schema or parameter list without the op's name and the defaults, with one spelling of ints and blanks."""
    text = signature[signature.index("(") :]
    text = _PARAMETER_DEFAULT.sub("", text).replace("SymInt", "int")
    return re.sub(r"\s*,\s*", ", ", re.sub(r"\s+", " ", text)).strip()
