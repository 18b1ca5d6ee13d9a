"""A layer on the stand-in NPU whose projections are merged, and whose weights change between calls."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rotary_cases import HEADS, HIDDEN, Layer
from stand_in import kernels
from torch import nn

import sgl_npu
from sgl_npu.passes import qkv_norm_rope
from sgl_npu.runtime.npu.package_ops import PACKAGE_OPS, ensure_package_ops

OP = "split_qkv_rmsnorm_rope"


class Layers(nn.Module):
    """Two attentions, one after the other. `norm`: as in Qwen3 ("llama") or as in Llama ("none")."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(norm=norm) for _ in range(2)])
        self.back = nn.ModuleList([nn.Linear(HEADS * 16, HIDDEN, bias=False) for _ in range(2)])

    def forward(self, x, positions):
        for layer, back in zip(self.layers, self.back, strict=True):
            x = x + back(layer(x, positions))
        return x


def install_kernel(monkeypatch: Any) -> None:
    """The stand-in has no sgl-kernel-npu: its op computes as on the CPU, and counts as installed."""
    ensure_package_ops()
    kernels.give_kernel(f"sgl_npu::{OP}", PACKAGE_OPS[OP].cpu)
    monkeypatch.setattr(qkv_norm_rope, "installed_clause", lambda *_: None)


def check_changes(norm: str, options: dict[str, Any]) -> None:
    """One graph for several lengths, the CPU's answer at each, also when weights have changed in between."""
    torch._dynamo.reset()
    model = Layers(norm).eval()
    on_npu = copy.deepcopy(model).to("npu")
    run = torch.compile(
        on_npu, backend="sgl_npu", dynamic=True, options=options | {"merge_projections": True, "strict": True}
    )
    before = len(sgl_npu.reports())

    def same(length: int) -> None:
        x, positions = torch.randn(2, length, HIDDEN), torch.arange(length)
        with torch.no_grad():
            expected, found = model(x, positions), run(x.to("npu"), positions.to("npu"))
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)

    same(9)
    for length, place in ((12, 0), (5, 1), (30, 2)):
        with torch.no_grad():
            for each in (model, on_npu):
                each.layers[1].linears[place].weight.mul_(2)
        same(length)
        new = torch.randn_like(model.layers[0].linears[place].weight) / 8
        model.layers[0].linears[place].weight = nn.Parameter(new)
        on_npu.layers[0].linears[place].weight = nn.Parameter(new.to("npu"))
        same(length)
        new = {name: torch.randn_like(x) / 8 for name, x in model.state_dict().items()}
        for each in (model, on_npu):
            each.load_state_dict(new)
        same(length)
    (report,) = sgl_npu.reports()[before:]
    assert [site.rotary.endswith("projections merged") for site in report.sites] == [True, True]
