"""What this machine has: libraries, kernels per platform, and how to get what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from sgl_npu.lowering.kernel import BackwardKernel, Kernel
from sgl_npu.lowering.platforms import PLATFORMS
from sgl_npu.lowering.sparse.table import NPU_KERNELS
from sgl_npu.runtime.npu import ensure_ops
from sgl_npu.runtime.npu.kernel_package import KERNELS, Resolved, resolve
from sgl_npu.runtime.npu.package_ops import PACKAGE_OPS

State = Literal["available", "emulated", "unavailable"]


@dataclass(frozen=True)
class Library:
    """A library that is asked for. `modules` are tried in order; `remedy` is for where none is there."""

    name: str
    distribution: str
    modules: tuple[str, ...]
    purpose: str
    remedy: str


@dataclass(frozen=True)
class LibraryStatus:
    name: str
    version: str | None
    present: bool
    purpose: str
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class KernelStatus:
    platform: str
    kernel: str
    op: str
    state: State
    reason: str = ""
    remedy: str = ""


_ASCEND = "an Ascend machine with the CANN toolkit"
LIBRARIES = (
    Library(
        "torch_npu", "torch-npu", ("torch_npu",),
        "NPU tensors and the fused attention ops",
        f"on {_ASCEND}: pip install torch-npu (the release that matches torch)",
    ),
    Library(
        "torchair", "torchair", ("torch_npu.dynamo.torchair", "torchair"),
        "compiles the rewritten graph for NPUs (GE graph, ACL graph)",
        "comes with torch_npu",
    ),
    Library(
        "sgl-kernel-npu", "sgl-kernel-npu", ("sgl_kernel_npu",),
        "SGLang's own NPU kernels",
        f"on {_ASCEND}: build it from github.com/sgl-project/sgl-kernel-npu",
    ),
    Library(
        "attentions", "attentions", ("attentions",),
        "SGLang's sparse NPU attentions (laser, block-sparse, rain fusion)",
        f"on {_ASCEND}: build it from github.com/sgl-project/sgl-kernel-npu",
    ),
    Library(
        "transformers", "transformers", ("transformers",),
        "language models, explain of a config, the demo",
        "pip install transformers",
    ),
    Library(
        "diffusers", "diffusers", ("diffusers",),
        "video and image transformers, the demo",
        "pip install diffusers",
    ),
)  # fmt: skip


def library_status(library: Library) -> LibraryStatus:
    """Whether the library is installed, and why not; torch_npu is imported, for it registers the ops."""
    module = next((name for name in library.modules if _is_installed(name)), None)
    if module is None:
        return LibraryStatus(library.name, None, False, library.purpose, "not installed", library.remedy)
    version = _version(library.distribution) or _version(module.partition(".")[0])
    if library.name == "torch_npu":
        try:
            importlib.import_module(module)
        except Exception as error:
            reason = f"installed, but its import fails: {error}"
            return LibraryStatus(
                library.name,
                version,
                False,
                library.purpose,
                reason,
                "check the CANN toolkit and its environment",
            )
    return LibraryStatus(library.name, version, True, library.purpose)


def _is_installed(module: str) -> bool:
    """Without importing the module itself; parents of a dotted name must be importable."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, OSError, RuntimeError):
        return False


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _npu(has_op: bool) -> tuple[State, str, str]:
    if ensure_ops() == "emulated":
        return (
            "emulated",
            "torch_npu is not there: CPU kernels of the same schemas and limits stand in",
            f"on {_ASCEND}: pip install torch-npu",
        )
    if not has_op:
        return "unavailable", "this torch_npu does not define the op", "install a newer torch_npu and CANN"
    return "available", "", ""


def _cuda(has_op: bool) -> tuple[State, str, str]:
    if torch.version.cuda is None:
        return "unavailable", "torch is built without CUDA", "install torch from a CUDA index (pytorch.org)"
    if not torch.cuda.is_available():
        return "unavailable", "torch finds no CUDA device", "check the driver with nvidia-smi"
    return _cpu(has_op)


def _cpu(has_op: bool) -> tuple[State, str, str]:
    if not has_op:
        return "unavailable", f"torch {torch.__version__} does not define the op", "pip install -U torch"
    return "available", "", ""


_Judge = Callable[[bool], tuple[State, str, str]]
_PLATFORM_STATE: dict[str, _Judge] = {
    "npu": _npu,
    "cuda": _cuda,
    "cpu": _cpu,
}


def _rows(platform: str) -> list[Kernel | BackwardKernel]:
    return [*PLATFORMS[platform].forward, *PLATFORMS[platform].backward]


def kernel_statuses() -> list[KernelStatus]:
    """Every forward and backward row of every platform, in the order they are tried, and torch_npu's sparse kernels."""
    ensure_ops()
    rows = [(platform, row.name, row.op) for platform in ("npu", "cuda", "cpu") for row in _rows(platform)]
    sparse = [
        ("npu", name, f"npu.{kernel.op}")
        for kernels in NPU_KERNELS.values()
        for name, kernel in kernels.items()
        if kernel.op
    ]
    return [KernelStatus(platform, name, op, *_state(platform, op)) for platform, name, op in rows + sparse]


def _state(platform: str, op: str) -> tuple[State, str, str]:
    """A row is judged by its op; one of plain torch ops has a description for a name and runs on any NPU."""
    namespace, _, name = op.partition(".")
    named = name.isidentifier()
    if platform == "npu" and not named:
        return "available", "", ""
    return _PLATFORM_STATE[platform](not named or hasattr(getattr(torch.ops, namespace), name))


def package_kernel_statuses() -> list[KernelStatus]:
    """The fused kernels of sgl-kernel-npu: the name and version that were found, or what to install."""
    return [_package_kernel_status(name) for name in KERNELS]


def _package_kernel_status(name: str) -> KernelStatus:
    found = resolve(name)
    if isinstance(found, Resolved):
        version = f" ({found.form.package} {found.version})" if found.version else ""
        return KernelStatus("npu", name, f"{found.form.target}{version}", "available")
    emulated = name in PACKAGE_OPS and ensure_ops() == "emulated"
    state: State = "emulated" if emulated else "unavailable"
    return KernelStatus("npu", name, KERNELS[name][0].target, state, found.reason, found.remedy)


def diagnose() -> dict[str, Any]:
    """Everything the doctor knows, as plain data."""
    libraries = [asdict(library_status(library)) for library in LIBRARIES]
    return {
        "sgl_npu": _version("sgl-npu"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "npu_ops": ensure_ops(),
        "libraries": libraries,
        "kernels": [asdict(status) for status in (*kernel_statuses(), *package_kernel_statuses())],
    }
