"""`sgl-npu bench TARGET`: a model eager, under Inductor and under sgl_npu, on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from sgl_npu.compiler.explain_target import Target, TargetError
from sgl_npu.compiler.progress import Step, silent
from sgl_npu.compiler.report import Report, merge, reports
from sgl_npu.compiler.timing import VARIANTS, Timing, first_output, max_error, measure_time

DEVICES = ("cpu", "cuda", "npu")
NOISY = 1.5


@dataclass(frozen=True)
class Bench:
    """Where the attentions went, how far the answer is from eager's, and how long each variant takes."""

    report: Report
    error: float  # largest absolute difference to eager
    scale: float  # largest absolute value of eager's output
    timings: tuple[Timing, ...]

    def speedups(self) -> dict[str, float]:
        """How many times faster than each other variant sgl_npu is, by the medians."""
        seconds = {timing.variant: timing.median for timing in self.timings}
        return {name: other / seconds["sgl_npu"] for name, other in seconds.items() if name != "sgl_npu"}

    def verdict(self) -> str:
        """The same in a line, and whether the machine was quiet enough to believe it."""
        text = "sgl_npu is " + ", ".join(f"{ratio:.2f}x as fast as {name}" for name, ratio in self.speedups().items())
        spread = max(timing.median / timing.fastest for timing in self.timings)
        if spread > NOISY:
            text += f"; noisy: a median is {spread:.1f}x its fastest run, so quiet the machine or give more --runs"
        return text


@torch.no_grad()
def bench(target: Target, device: str, options: Mapping[str, Any], runs: int, step: Step = silent) -> Bench:
    """Compile and run a target on a device, in `steps_of(runs)` steps.

    Raises TargetError for a device that is not there, NoTensor for a model that returns none.
    """
    _check_device(device)
    torch.compiler.reset()  # what this process has compiled before would not be compiled, and not be reported, again
    model = target.model.to(device) if isinstance(target.model, nn.Module) else target.model
    args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (target.args, target.kwargs))
    ways = {name: VARIANTS[name](model) for name in ("eager", "inductor") if device != "npu" or name != "inductor"}
    ways["sgl_npu"] = torch.compile(model, backend="sgl_npu", options=dict(options))
    callers = {name: partial(way, *args, **kwargs) for name, way in ways.items()}
    step("comparing with eager")
    expected = first_output(callers["eager"]())
    seen = len(reports())
    found = first_output(callers["sgl_npu"]())
    report = merge(reports()[seen:])
    error, scale = max_error(found, expected), expected.float().abs().max().item()
    return Bench(report, error, scale, measure_time(callers, runs, step))


def steps_of(runs: int) -> int:
    """At most: an NPU has no Inductor."""
    return 1 + len(VARIANTS) + runs


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise TargetError(f"--device {device}: should be one of {', '.join(DEVICES)}")
    if device != "cpu" and not getattr(torch, device, None):
        raise TargetError(f"--device {device}: this torch does not know it; install torch_npu, or give --device cpu")
    if device != "cpu" and not getattr(torch, device).is_available():
        raise TargetError(f"--device {device}: there is none on this machine; give --device cpu")
