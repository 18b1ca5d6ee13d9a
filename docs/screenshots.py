"""The pictures of docs/report.md, made anew: python -m docs.screenshots [NAME ...]

Models with random weights, small where their data is shown and of their real widths where it is not. Needs the extras
`test` and `models`, and Chromium.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

import sgl_npu
from docs.browser import open_page
from sgl_npu.compiler.planned_ranks import planned_ranks

IMAGES = Path(__file__).parent / "img"
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shot:
    """A page and what of it is shown: `build` gives a model and its inputs, `site` the attention that is opened."""

    title: str
    build: Callable[[], tuple[torch.nn.Module, dict[str, Any]]]
    options: dict[str, Any] = field(default_factory=dict)
    site: int = 0
    ranks: int = 1
    fake: bool = False
    height: int = 900
    theme: str = "light"


def llama() -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=16,
        vocab_size=2000,
        attn_implementation="eager",
    )
    mask = torch.ones(2, 384, dtype=torch.long)
    mask[1, :120] = 0
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "use_cache": False}
    return LlamaForCausalLM(config).eval(), inputs


def gemma() -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=1152, intermediate_size=6912, num_hidden_layers=12, vocab_size=2000, sliding_window=512,
        attn_implementation="eager",
    )  # fmt: skip
    tokens = torch.zeros(1, 4096, dtype=torch.long)
    return Gemma3ForCausalLM(config).eval(), {"input_ids": tokens, "use_cache": False}


def flux() -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(num_layers=2, num_single_layers=4)
    inputs = {
        "hidden_states": torch.zeros(1, 4096, 64, dtype=BF16),
        "encoder_hidden_states": torch.zeros(1, 512, 4096, dtype=BF16),
        "pooled_projections": torch.zeros(1, 768, dtype=BF16),
        "timestep": torch.zeros(1, dtype=BF16),
        "img_ids": torch.zeros(4096, 3, dtype=BF16),
        "txt_ids": torch.zeros(512, 3, dtype=BF16),
        "return_dict": False,
    }
    return model.eval(), inputs


def wan() -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, text_dim=256, freq_dim=64, ffn_dim=512, num_layers=3
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 9, 48, 64, dtype=BF16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 128, 256, dtype=BF16),
        "return_dict": False,
    }
    return model.eval(), inputs


RAIN = {"attention": "rain_fusion_attn", "attention_config": {"sparsity": 0.8}}
SHOTS = {
    "llama": Shot("Llama, 16 layers, two samples of 384 tokens, one of them padded", llama, height=884),
    "gemma": Shot("Gemma 3, 12 layers, 4096 tokens, windows of 512", gemma, fake=True, theme="dark"),
    "flux": Shot(
        "Flux, 512 tokens of text and 4096 of a picture on 4 ranks", flux, {"parallel": {"ulysses": 2, "ring": 2}},
        ranks=4, fake=True, height=1016,
    ),
    "wan": Shot("Wan, 9 x 24 x 32 tokens of a video, rain fusion", wan, RAIN, height=1216),
}  # fmt: skip


def _in_bfloat16(build: Callable[[], Any]) -> Any:
    """Built in that dtype from the start: parameters without data cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def report_of(shot: Shot) -> sgl_npu.Report:
    mode = FakeTensorMode(allow_non_fake_inputs=True) if shot.fake else contextlib.nullcontext()
    with planned_ranks(shot.ranks), mode, torch.no_grad():
        model, inputs = _in_bfloat16(shot.build)
        return sgl_npu.explain(model, options={"platform": "npu", **shot.options}, **inputs)


def main(names: list[str]) -> None:
    IMAGES.mkdir(exist_ok=True)
    for name in names or SHOTS:
        shot = SHOTS[name]
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / f"{name}.html"
            report_of(shot).to_html(page, shot.title)
            with open_page(page, height=shot.height, theme=shot.theme, fragment=f"#site={shot.site}") as tab:
                tab.screenshot(path=IMAGES / f"report-{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
