"""Sparse attention on the stand-in: small models through one of Ascend's compilers, held against the CPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sparse.sparse_cases import small_wan, wan_inputs
from stand_in import kernels
from torch import Tensor, nn

import sgl_npu
from sgl_npu.compiler.report import Report
from sgl_npu.lowering.sparse import table
from sgl_npu.runtime.npu.package_ops import PACKAGE_OPS, ensure_package_ops

BF16 = torch.bfloat16
# Tokens are no multiple of a block. Laser attention wants 2048 of them, and block-sparse attention leaves something out
# of more than 1280.
GRIDS = {"laser_attn": (3, 28, 28)}
GRID = (3, 21, 23)


@dataclass(frozen=True)
class Case:
    """A method by one of its kernels. `ge`: the operator of GE that the kernel becomes, the last one of the site's."""

    attention: str
    op: str
    ge: str
    config: dict[str, Any]


CASES = {
    "laser": Case("laser_attn", "sgl_npu.laser_attention", "LaserAttention", {}),
    "block-sparse": Case(
        "block_sparse_attn", "sgl_npu.block_sparse_attention", "AdaBlockSparseAttention", {"sparsity": 0.6}
    ),
    "rain fusion of the package": Case(
        "rain_fusion_attn",
        "sgl_npu.rain_fusion_attention",
        "RainFusionAttention",
        {"sparsity": 0.6, "kernel": "rain_fusion_attention"},
    ),
    "rain fusion of torch_npu": Case(
        "rain_fusion_attn",
        "npu.npu_block_sparse_attention",
        "BlockSparseAttention",
        {"sparsity": 0.6, "kernel": "npu_block_sparse_attention"},
    ),
}


@contextlib.contextmanager
def installed_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if sgl-kernel-npu were there: its kernels are found, and ours around them compute what the CPU's do."""
    ensure_package_ops()
    monkeypatch.setattr(table, "resolve", lambda name: object())
    with contextlib.ExitStack() as stack:
        for name, op in PACKAGE_OPS.items():
            stack.enter_context(kernels.given_kernel(f"sgl_npu::{name}", op.cpu))
        yield


def compiled(
    module: nn.Module, case: Case, config: dict[str, Any], dynamic: bool | None = False, **options: Any
) -> Any:
    settings = {"attention": case.attention, "attention_config": {**case.config, **config}, "strict": True, **options}
    return torch.compile(module, backend="sgl_npu", dynamic=dynamic, options=settings)


def to_npu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to("npu") if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _attentive_wan() -> nn.Module:
    """Weights that make the choice of keys matter in the result."""
    module = small_wan(1)
    for block in module.blocks:
        block.attn1.norm_q.weight.data *= 6
        block.attn1.to_v.weight.data *= 6
        block.scale_shift_table.data[:, 2] += 3  # the gate of attention's result
    return module.to(BF16)


def check_wan(case: Case, inner: str, inner_options: dict[str, Any], batch: int = 2) -> Report:
    """A small Wan in bfloat16 on the NPU gives what it gives on the CPU with the same kernel, which is not dense."""
    shape = GRIDS.get(case.attention, GRID)
    module, inputs = _attentive_wan(), wan_inputs(*shape, batch=batch, dtype=BF16)
    grid = {} if case.attention == "laser_attn" else {"latent_shape": shape}
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    on_npu = compiled(copy.deepcopy(module).to("npu"), case, grid, inner=inner, inner_options=inner_options)
    on_cpu = compiled(module, case, grid, platform="npu")
    with torch.no_grad():
        found, expected = on_npu(**to_npu(inputs))[0].cpu().float(), on_cpu(**inputs)[0].float()
        dense = module(**inputs)[0].float()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    if case.attention != "laser_attn":
        assert (found - dense).abs().max() > 0.1
    report = sgl_npu.reports()[before]
    assert report.inner == inner
    assert [site.op for site in report.sites] == [case.op, "npu.npu_fused_infer_attention_score"]
    return report


EXTRA_WIDTHS = (1, 3)  # npugraph_ex has another graph for multiples of a block


def check_widths(case: Case, inner: str, inner_options: dict[str, Any]) -> Report:
    """One graph for videos of every width, whose grid is read off the graph. Numbers as on the CPU."""
    module = _attentive_wan()
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    on_npu = compiled(copy.deepcopy(module).to("npu"), case, {}, None, inner=inner, inner_options=inner_options)
    frames, height, width = GRIDS.get(case.attention, GRID)
    calls = [wan_inputs(frames, height, width + more, dtype=BF16) for more in EXTRA_WIDTHS]
    found = []
    with torch.no_grad():
        for inputs in calls:
            found.append(on_npu(**_any_width(to_npu(inputs)))[0].cpu().float())
        (report,) = sgl_npu.reports()[before:]
        torch._dynamo.reset()
        on_cpu = compiled(module, case, {}, None, platform="npu")
        for inputs, one in zip(calls, found, strict=True):
            torch.testing.assert_close(one, on_cpu(**_any_width(inputs))[0].float(), rtol=2e-2, atol=2e-2)
    return report


def _any_width(inputs: dict[str, Any]) -> dict[str, Any]:
    """Other sizes may be numbers: a graph in which all are symbols takes twice as long to trace."""
    torch._dynamo.mark_dynamic(inputs["hidden_states"], 4)
    return inputs
