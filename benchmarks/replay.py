"""A step of decoding by a graph: CUDAGraph.replay() and the copies that it needs, by hand, beside the runner."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import median_seconds

from sgl_npu import GraphRunner

LAYERS, HIDDEN, HEADS, CACHE, VOCABULARY = 24, 1024, 16, 512, 32000
BATCHES = (1, 8)


class Layer(nn.Module):
    """Attention to a cache that stays where it is, and an MLP; (B, 1, HIDDEN) to the same."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False), nn.Linear(4 * HIDDEN, HIDDEN, bias=False)
        self.register_buffer("cache", torch.zeros(2, batch, HEADS, CACHE, HIDDEN // HEADS))

    def forward(self, x: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        query, *new = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        rows = torch.arange(len(x), device=x.device)
        for cache, entry in zip(self.cache, new, strict=True):
            cache[rows, :, position_ids[:, 0]] = entry[:, :, 0]
        out = F.scaled_dot_product_attention(query, *self.cache, attn_mask=mask)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
    """(B, 1) token ids and positions to (B, 1, VOCABULARY) logits."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(batch) for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        mask = torch.arange(CACHE, device=x.device) <= position_ids[:, None, :, None]
        for layer in self.layers:
            x = layer(x, position_ids, mask)
        return self.head(x)


def _by_hand(model: Decoder, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A graph of torch alone, as its notes on CUDA graphs write it."""
    static = {name: x.clone() for name, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(**static)

    def run() -> Tensor:
        for name, x in inputs.items():
            static[name].copy_(x)
        graph.replay()
        return out

    return run


def _by_runner(model: Decoder, inputs: dict[str, Tensor], outputs: Any) -> Callable[[], Tensor]:
    dims = {name: ("batch", "tokens") for name in inputs}
    batch = len(inputs["input_ids"])
    runner = GraphRunner(model, buckets=[batch], dims=dims, output_dims=("batch", "tokens"), outputs=outputs)
    runner.capture(**inputs)
    return lambda: runner(**inputs)


@dataclass(frozen=True)
class Cost:
    """Median seconds of a step: until it is done on the device, and of that until the call returns."""

    step: float
    call: float


@torch.no_grad()
def measure(batch: int, runs: int) -> dict[str, Cost]:
    """Per variant; they take turns. "by hand, again" is the same captured once more: how far two may be apart."""
    torch.manual_seed(0)
    model = Decoder(batch).to("cuda", torch.bfloat16).eval()
    inputs = {
        "input_ids": torch.randint(0, VOCABULARY, (batch, 1), device="cuda"),
        "position_ids": torch.randint(0, CACHE, (batch, 1), device="cuda"),
    }
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        name: partial(_by_hand, model, inputs) for name in ("by hand", "by hand, again")
    }
    makers |= {f"runner, {outputs}": partial(_by_runner, model, inputs, outputs) for outputs in ("view", "copy")}
    # Kernels of a graph may take longer once the process has run on more than one stream (pytorch#161104), so all are
    # captured after the model has run on the default one, and in any order.
    expected = model(**inputs)
    variants = {name: makers[name]() for name in random.sample(list(makers), len(makers))}
    variants["eager"] = lambda: model(**inputs)
    for run in variants.values():
        for _ in range(5):
            torch.testing.assert_close(run(), expected, atol=2e-2, rtol=2e-2)
    calls: dict[str, list[float]] = {name: [] for name in variants}
    steps = median_seconds({name: partial(_call, run, calls[name]) for name, run in variants.items()}, runs)
    return {name: Cost(steps[name], median(calls[name])) for name in variants}


def _call(run: Callable[[], Tensor], seconds: list[float]) -> None:
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
