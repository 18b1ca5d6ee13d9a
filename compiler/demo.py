"""Whole models, measured: a language model and a video transformer, eager, under Inductor, under sgl_npu.

`demo_models` builds them, `run_demo` measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sgl_npu.compiler.explain import explain
from sgl_npu.compiler.report import Report, reports
from sgl_npu.compiler.timing import VARIANTS, Timing, first_output, max_error, measure_time


class MissingLibrary(RuntimeError):
    """A model library that is not installed; the message says how to get it."""


@dataclass(frozen=True)
class DemoModel:
    """A model and the keyword arguments of one call."""

    name: str
    module: nn.Module
    inputs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> DemoModel:
        """The same in another floating dtype, every parameter of it; the module itself is converted."""
        inputs = {
            name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in self.inputs.items()
        }
        return DemoModel(self.name, nn.Module.to(self.module, dtype), inputs)


@dataclass(frozen=True)
class Measurement:
    """One model on one platform: where its attentions went, how far from eager, and how fast."""

    model: str
    platform: str
    dtype: str
    report: Report
    error: float  # largest absolute difference to eager
    scale: float  # largest absolute value of eager's output
    timings: tuple[Timing, ...] = ()


def language_model() -> DemoModel:
    """A small Llama with a KV cache and grouped-query attention, 512 tokens."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingLibrary(f"transformers cannot be imported ({error}): pip install transformers") from None
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=4,
        vocab_size=1000,
        use_cache=True,
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (1, 512))
    return DemoModel("Llama", LlamaForCausalLM(config).eval(), {"input_ids": tokens, "use_cache": True})


def video_transformer() -> DemoModel:
    """A small Wan: self-attention over 1536 video tokens, cross-attention to 128 text tokens."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise MissingLibrary(f"diffusers cannot be imported ({error}): pip install diffusers") from None
    torch.manual_seed(0)
    module: nn.Module = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        text_dim=256,
        freq_dim=64,
        ffn_dim=512,
        num_layers=3,
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 6, 32, 32),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 128, 256),
        "return_dict": False,
    }
    return DemoModel("Wan", module.eval(), inputs)


def demo_models() -> dict[str, Callable[[], DemoModel]]:
    return {"Llama": language_model, "Wan": video_transformer}


@torch.no_grad()
def measure_cpu(demo: DemoModel, runs: int) -> Measurement:
    """As the model is, on the CPU: report, error and time of every variant."""
    callers = {name: variant(demo.module) for name, variant in VARIANTS.items()}
    expected = first_output(demo.module(**demo.inputs))
    seen = len(reports())
    found = first_output(callers["sgl_npu"](**demo.inputs))
    return Measurement(
        demo.name,
        "cpu",
        _dtype(demo),
        reports()[seen],
        max_error(found, expected),
        expected.abs().max().item(),
        measure_time({name: partial(call, **demo.inputs) for name, call in callers.items()}, runs),
    )


@torch.no_grad()
def measure_npu(demo: DemoModel) -> Measurement:
    """The graph an NPU would get, on emulated NPU ops: report and error. Its time would say nothing."""
    options: dict[str, Any] = {"platform": "npu", "inner": "eager"}
    report = explain(demo.module, options=options, **demo.inputs)
    expected = first_output(demo.module(**demo.inputs))
    found = first_output(torch.compile(demo.module, backend="sgl_npu", options=options)(**demo.inputs))
    return Measurement(
        demo.name,
        "npu (emulated)",
        _dtype(demo),
        report,
        max_error(found, expected),
        expected.float().abs().max().item(),
    )


def run_demo(runs: int = 5) -> Iterator[tuple[str, Callable[[], Measurement]]]:
    """The steps of the demonstration: what a step is, and the call that does it."""
    for name, build in demo_models().items():
        yield f"{name}, float32, CPU", partial(_cpu_step, build, runs)
        yield f"{name}, bfloat16, emulated NPU ops", partial(_npu_step, build)


def _cpu_step(build: Callable[[], DemoModel], runs: int) -> Measurement:
    return measure_cpu(build(), runs)


def _npu_step(build: Callable[[], DemoModel]) -> Measurement:
    return measure_npu(build().to(torch.bfloat16))


def _dtype(demo: DemoModel) -> str:
    return str(next(demo.module.parameters()).dtype).removeprefix("torch.")
