"""A step of decoding on a CPU: one token against a static cache of transformers, ours beside plain Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from turns import median_seconds

LAYERS, HIDDEN, HEADS, KV_HEADS, CACHE, PROMPT = 24, 1024, 16, 8, 1024, 512
BATCHES = (1, 8)
BACKENDS = {"inductor": "inductor", "ours": "sgl_npu"}


def decoder(dtype: torch.dtype) -> torch.nn.Module:
    """A Qwen3 of random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32000,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=CACHE,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval().to(dtype)


def step(model: torch.nn.Module, run: Callable, batch: int) -> Callable[[], torch.Tensor]:
    """One token after PROMPT others in a cache of CACHE, as `generate()` calls the model; every call is the same."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    torch.manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (batch, PROMPT + 1))
    cache.early_initialization(batch, KV_HEADS, HIDDEN // HEADS, model.dtype, torch.device("cpu"))
    for layer in cache.layers:
        layer.keys[:, :, :PROMPT].normal_()
        layer.values[:, :, :PROMPT].normal_()
    inputs: dict[str, Any] = {
        "input_ids": tokens[:, -1:].contiguous(),
        "attention_mask": (torch.arange(CACHE) <= PROMPT).expand(batch, 1, 1, CACHE).contiguous(),
        "position_ids": torch.full((batch, 1), PROMPT),
    }

    def call() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        return run(**inputs, past_key_values=cache, use_cache=True).logits

    return call


@torch.no_grad()
def measure(batch: int, dtype: torch.dtype, runs: int) -> dict[str, float]:
    """Median seconds of a step under each backend; they take turns."""
    torch._dynamo.reset()
    model = decoder(dtype)
    variants = {name: step(model, torch.compile(model, backend=backend), batch) for name, backend in BACKENDS.items()}
    expected = step(model, model, batch)()
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    for run in variants.values():
        for _ in range(3):
            error = (run() - expected).norm() / expected.norm()  # single logits of 24 layers in bfloat16 differ by more
            if not error <= tolerance:
                raise AssertionError(f"the logits are {error:.1e} from eager's; the limit is {tolerance:.0e}")
    return median_seconds(variants, runs)
