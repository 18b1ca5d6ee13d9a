"""What the emulated fused attention of Ascend is called with."""

from __future__ import annotations

from typing import Any

from sgl_npu.runtime.npu import fused_infer


def recorded(monkeypatch: Any) -> list[Any]:
    """Every call of the fused op that is run from now on, as its rules see it, and its tensors."""
    seen: list[Any] = []
    compute = fused_infer.compute

    def record(call, tensors, scale):
        seen.append((call, tensors))
        return compute(call, tensors, scale)

    monkeypatch.setattr(fused_infer, "compute", record)
    return seen
