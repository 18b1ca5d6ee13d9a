"""Which method replaces an attention on which platform, and what each refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, Kernel, is_empty, open_band
from sgl_npu.lowering.sparse import block_sparse, laser, rain_fusion
from sgl_npu.lowering.sparse.blocks import blocks_op
from sgl_npu.lowering.sparse.setting import BLOCK_SPARSE, LASER, RAIN_FUSION, SparseSetting
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.runtime.npu import is_emulated
from sgl_npu.runtime.npu.kernel_package import Absent, resolve
from sgl_npu.runtime.sizes import known

HEAD_SIZES = (32, 64, 96, 128)  # SGLang's get_supported_head_sizes of the three backends

Judge = Callable[[AttentionCall, SparseSetting], "str | None"]
Emit = Callable[[AttentionCall, Any, SparseSetting], Tensor]  # the grid is there for rows of methods that need one


@dataclass(frozen=True)
class Row:
    """A method on a platform. `op` may depend on the inner compiler, so it is a function of the call."""

    op: Callable[[AttentionCall], str]
    refuse: Judge
    emit: Emit


def _dense_elsewhere(call: AttentionCall, setting: SparseSetting) -> str:
    return "laser attention is a dense kernel of Ascend: the platform's own dense kernel gives the same"


def _takes_all(call: AttentionCall, setting: SparseSetting) -> None:
    return None


_LASER = Row(lambda call: "", _dense_elsewhere, lambda call, grid, setting: call.query)
_BLOCKS = Row(blocks_op, _takes_all, block_sparse.emit_block_sparse)
_RAIN = Row(blocks_op, _takes_all, rain_fusion.emit_rain_fusion)

# Where there is no NPU.
ROWS: dict[str, Row] = {LASER: _LASER, BLOCK_SPARSE: _BLOCKS, RAIN_FUSION: _RAIN}


@dataclass(frozen=True)
class NpuKernel:
    """A kernel of Ascend that computes a method, and what it needs.

    `package`: of sgl-kernel-npu, by its names in `sgl_npu.runtime.npu.kernel_package`. `op`: of torch_npu.
    """

    row: Row
    package: tuple[str, ...] = ()
    op: str = ""

    def missing(self) -> str:
        """What of it this machine does not have and what to install, empty where nothing is missing. For NPUs."""
        found = [resolve(name) for name in self.package]
        reasons = [str(x) for x in found if isinstance(x, Absent)]
        if self.op and (is_emulated() or not hasattr(torch.ops.npu, self.op)):
            reasons.append(f"{self.op}: torch_npu does not define it; pip install torch-npu 2.13.0 or newer")
        return "; ".join(reasons)


# The kernels of a method by their names, in the order they are tried.
NPU_KERNELS: dict[str, dict[str, NpuKernel]] = {
    LASER: {
        "laser_attention": NpuKernel(
            Row(
                lambda call: laser.LASER_OP,
                lambda call, setting: laser.refuse_laser(call),
                lambda call, grid, setting: laser.emit_laser(call),
            ),
            package=("laser_attention",),
        )
    },
    BLOCK_SPARSE: {
        "block_sparse_attention": NpuKernel(
            Row(
                lambda call: block_sparse.BLOCK_SPARSE_OP,
                block_sparse.refuse_block_sparse_npu,
                block_sparse.emit_block_sparse_npu,
            ),
            package=("sparse_block_estimate", "block_sparse_attention"),
        )
    },
    RAIN_FUSION: {
        "rain_fusion_attention": NpuKernel(
            Row(
                lambda call: rain_fusion.RAIN_FUSION_OP,
                rain_fusion.refuse_rain_fusion_npu,
                rain_fusion.emit_rain_fusion_npu,
            ),
            package=("rain_fusion_attention",),
        ),
        "npu_block_sparse_attention": NpuKernel(
            Row(
                lambda call: rain_fusion.BLOCK_MASK_OP,
                rain_fusion.refuse_block_mask_npu,
                rain_fusion.emit_block_mask_npu,
            ),
            op="npu_block_sparse_attention",
        ),
    },
}


def npu_kernel(method: str, kernel: str, installed: bool) -> str:
    """The name of the kernel that computes a method: the one asked for, or with "auto" the first.

    `installed`: of those that this machine has; LookupError says why it has none. Otherwise they are emulated.
    """
    kernels = NPU_KERNELS[method]
    names = list(kernels) if kernel == "auto" else [kernel]
    if not installed:
        return names[0]
    reasons = []
    for name in names:
        if not (missing := kernels[name].missing()):
            return name
        reasons.append(missing)
    raise LookupError("; or ".join(reasons))


def _row(setting: SparseSetting, platform: str) -> Row:
    if platform != "npu":
        return ROWS[setting.method]
    kernels = NPU_KERNELS[setting.method]
    return kernels[setting.kernel or next(iter(kernels))].row


def refuse_call(call: AttentionCall) -> str | None:
    """What no method takes: anything but plain attention of a sequence to itself."""
    call = open_band(call)
    given = ("mask", call.mask), ("bias", call.bias), ("sinks", call.sinks)
    for name, value in given:
        if value is not None:
            return f"it has {'a ' if name != 'sinks' else ''}{name}: the kernels take none"
    if call.lower is not None or call.upper is not None:
        return "its mask is causal or a band: the kernels attend to every token"
    if call.softcap > 0.0:
        return f"softcap = {call.softcap}: the kernels have no softcap"
    if call.needs_lse:
        return "its lse is used: the kernels give none that may be relied on"
    if not known(call.query.size(2) == call.key.size(2)):
        return f"{call.query.size(2)} queries attend to {call.key.size(2)} keys: no attention of a sequence to itself"
    size, value_size = call.query.size(3), call.value.size(3)
    if not known(size == value_size) or not any(known(size == number) for number in HEAD_SIZES):
        both = f"{size}" if known(size == value_size) else f"{size} and {value_size}"
        return f"head size {both} is not one of {', '.join(map(str, HEAD_SIZES))}"
    return "an empty batch, query or key" if is_empty(call) else None


def sparse_kernel(setting: SparseSetting, platform: str, grid: TokenGrid | str | None, call: AttentionCall) -> Kernel:
    """The row as a kernel for one attention. `grid`: where its video is, or why it gets no sparse kernel."""
    row = _row(setting, platform)

    def refuse(call: AttentionCall) -> str | None:
        if reason := refuse_call(call):
            return reason
        if isinstance(grid, str):
            return grid
        if setting.method == LASER and isinstance(call.query.size(2), int) and call.query.size(2) < laser.MIN_LENGTH:
            return f"{call.query.size(2)} tokens: under {laser.MIN_LENGTH} dense attention is faster"
        return row.refuse(call, setting)

    def emit(call: AttentionCall) -> tuple[Tensor, None]:
        return row.emit(call, grid if isinstance(grid, TokenGrid) else None, setting), None

    return Kernel(setting.method, row.op(call), refuse, emit)


def fewest_tokens(setting: SparseSetting) -> int:
    """Below this many tokens the dense kernels are used, also where the length is a symbol."""
    return laser.MIN_LENGTH if setting.method == LASER else 0
