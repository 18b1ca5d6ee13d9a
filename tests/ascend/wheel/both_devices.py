"""One function compiled for the NPU platform from CPU tensors and from tensors of the stand-in: what came of each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import sgl_npu

sys.path.append(str(Path(__file__).parents[2]))  # the spellings and masks that the tests on the CPU use

CPU, NPU = "cpu", "npu:0"
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5}
OPTIONS = {"platform": "npu", "inner": "eager", "strict": True}


@dataclass(frozen=True)
class Traced:
    """The reports of what was compiled on one device."""

    reports: list[sgl_npu.Report]

    @property
    def sites(self) -> list[tuple[Any, ...]]:
        """What must not depend on the device, site by site."""
        return [
            (site.fused, site.mask, site.op, site.kernel, site.query, site.key, site.value, site.refusals)
            for report in self.reports
            for site in report.sites
        ]

    @property
    def graph(self) -> str:
        """The final graphs, the device's name left out."""
        text = "\n".join(report.graph for report in self.reports)
        for name in (NPU, "npu", CPU):
            text = text.replace(f"device={name},", "device=_,").replace(f"device={name})", "device=_)")
        return text


def compiled_on(device: str, function: Callable, *calls: Sequence[Any], dynamic: Sequence[int] = ()) -> Traced:
    """Compile `function` on a device, run it on all `calls`, and hold each result against eager on the CPU.

    `dynamic` are the dimensions that are symbolic of every argument that is no matrix.
    """
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    run = torch.compile(function, backend="sgl_npu", options=OPTIONS, dynamic=None if dynamic else False)
    with torch.no_grad():
        for arguments in calls:
            expected = function(*arguments)
            given = tree_map_only(torch.Tensor, lambda x: x.to(device, copy=True), arguments)
            for x in tree_leaves(given):
                for dim in dynamic if isinstance(x, torch.Tensor) and x.dim() > 2 else ():
                    torch._dynamo.mark_dynamic(x, dim)
            with default_device(device):
                result = run(*given)
            assert_same(result, expected, device)
    return Traced(sgl_npu.reports()[before:])


def compiled_on_both(function: Callable, *calls: Sequence[Any], dynamic: Sequence[int] = ()) -> tuple[Traced, Traced]:
    """(CPU, NPU), one graph each for all calls."""
    traced = [compiled_on(device, function, *calls, dynamic=dynamic) for device in (CPU, NPU)]
    assert [len(x.reports) for x in traced] == [1, 1]
    return traced[0], traced[1]


def assert_same(result: Any, expected: Any, device: str) -> None:
    for x, y in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        assert x.device == torch.device(device)
        tolerance = TOLERANCES[y.dtype]
        torch.testing.assert_close(x.cpu(), y, atol=tolerance, rtol=tolerance)
        strides = [(one, other) for n, one, other in zip(x.shape, x.stride(), y.stride(), strict=True) if n > 1]
        assert all(one == other for one, other in strides), (x.shape, x.stride(), y.stride())


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    """Where tensors are made that name no device. With it Dynamo cannot trace Tensor.unflatten (seen in torch 2.13)."""
    original = torch.Tensor.unflatten
    torch.Tensor.unflatten = lambda x, dim, sizes: torch.unflatten(x, dim, sizes)
    try:
        with torch.device(device):
            yield
    finally:
        torch.Tensor.unflatten = original
