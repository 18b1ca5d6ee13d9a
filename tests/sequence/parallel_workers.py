"""What the tests of whole models run on every rank: a model compiled for the ranks, beside the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from sequence.collective_counts import collective_counts
from sequence.model_cases import CASES, Inputs, error, outputs
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sgl_npu
from sgl_npu import Parallel


@dataclass(frozen=True)
class Result:
    """`errors` by call; of the last graph: its text, its collectives by kind, and the schemes of its sites."""

    errors: list[float]
    graph: str
    collectives: dict[str, int]
    schemes: list[str]
    refused: str
    graphs: int


def summary(errors: list[float], before: int) -> Result:
    """The result of calls that made all reports from number `before` on."""
    found = sgl_npu.reports()[before:]
    last = found[-1]
    refused = "; ".join(part.refused for part in last.parallel)
    schemes = [site.scheme for site in last.sites]
    return Result(errors, last.graph, collective_counts(last.graph), schemes, refused, len(found))


def compiled(
    module: torch.nn.Module, parallel: dict[str, Any], inner: str = "eager", platform: str = "auto", **settings: Any
) -> Callable:
    options = {"parallel": Parallel(**parallel), "inner": inner, "platform": platform, "strict": True}
    return torch.compile(module, backend="sgl_npu", options=options, fullgraph=True, **settings)


def model(
    name: str,
    parallel: dict[str, Any],
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    inner: str = "eager",
    batch: int = 1,
    dynamic: bool | None = None,
    platform: str = "auto",
) -> Result:
    """The errors of a model of `model_cases` over some sizes."""
    case, before = CASES[name], len(sgl_npu.reports())
    module = case.module(dtype)
    run, errors = compiled(module, parallel, inner, platform, dynamic=dynamic), []
    with torch.no_grad():
        for number, (length, text) in enumerate(sizes):
            wish = Inputs(length, text, batch, dtype, seed=number)
            expected = outputs(module(**case.inputs(wish)))
            errors.append(error(outputs(run(**case.inputs(wish))), expected))
    return summary(errors, before)


def _llama(layers: int = 2) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=101, **sizes)).eval()


def _tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shards_as_inputs(parallel: dict[str, Any], lengths: Sequence[int]) -> Result:
    """Every rank calls the model with its own tokens and gets its own logits; positions are the model's own."""
    module, before, errors = _llama(), len(sgl_npu.reports()), []
    run, rank, world = compiled(module, {"shard": "inputs", **parallel}), dist.get_rank(), dist.get_world_size()
    zigzag = parallel.get("placement") == "zigzag"

    def own(x: Tensor) -> Tensor:
        chunks = x.chunk(world * (2 if zigzag else 1), 1)
        return torch.cat([chunks[rank], chunks[-1 - rank]], 1) if zigzag else chunks[rank].contiguous()

    for number, length in enumerate(lengths):
        tokens = _tokens(length, seed=number)
        expected = own(module(tokens, use_cache=False).logits)
        errors.append((run(own(tokens), use_cache=False).logits - expected).abs().max().item())
    return summary(errors, before)


@torch.no_grad()
def beside_other_parallelism(kind: str, parallel: dict[str, Any]) -> float:
    """The error of a model whose sequence is on two of four ranks, the other two having other data or other weights."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=(kind, next(iter(parallel))))
    module = _llama()
    tokens = _tokens(37, seed=mesh.get_local_rank(kind) if kind == "data" else 0)
    expected = module(tokens, use_cache=False).logits
    if kind == "tensor":
        plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
        plan |= {name: RowwiseParallel() for name in ("o_proj", "down_proj")}
        for layer in module.model.layers:
            for part in (layer.self_attn, layer.mlp):
                own = {name: style for name, style in plan.items() if hasattr(part, name)}
                parallelize_module(part, mesh["tensor"], own)
    run = compiled(module, {**parallel, "mesh": mesh})
    return (run(tokens, use_cache=False).logits - expected).abs().max().item()


@torch.no_grad()
def prefill_then_decode(parallel: dict[str, Any]) -> list[float]:
    """Errors of a prefill on the ranks and of three tokens that each rank decodes on its own from its cache."""
    module, tokens = _llama(), _tokens(41)
    expected = module(tokens[:, :38], use_cache=True)
    found = compiled(module, parallel)(tokens[:, :38], use_cache=True)
    errors = [(found.logits - expected.logits).abs().max().item()]
    for step in range(38, 41):
        expected = module(tokens[:, step : step + 1], past_key_values=expected.past_key_values, use_cache=True)
        found = module(tokens[:, step : step + 1], past_key_values=found.past_key_values, use_cache=True)
        errors.append((found.logits - expected.logits).abs().max().item())
    return errors


class Windows(torch.nn.Module):
    """Attention to the sequence, then inside of windows cut out of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        x = x + first(x, x, x, need_weights=False)[0]
        windows = x.view(3 * x.size(0), -1, 32)
        return windows + second(windows, windows, windows, need_weights=False)[0]


class FoldedHeads(torch.nn.Module):
    """Heads in the batch, as nn.MultiheadAttention has them where it returns its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class KeptKeys(torch.nn.Module):
    """Two attentions; something takes the keys and values of the second as all ranks have them, as a cache does."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal = causal
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        key = value = x
        for layer in self.layers:
            query, key, value = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in layer(x).chunk(3, 2))
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
            x = x + out.transpose(1, 2).flatten(2)
        return x + (key.cumsum(2) + value.cumsum(2)).transpose(1, 2).flatten(2)


SMALL = {
    "windows": Windows,
    "folded heads": FoldedHeads,
    "kept keys": partial(KeptKeys, causal=False),
    "kept keys, causal": partial(KeptKeys, causal=True),
}


@torch.no_grad()
def small(name: str, parallel: dict[str, Any], shape: tuple[int, ...]) -> Result:
    """The error of one of the small modules."""
    module, before = SMALL[name]().eval(), len(sgl_npu.reports())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = compiled(module, {"max_gather": 1e9, **parallel})(x)
    return summary([(found - module(x)).abs().max().item()], before)
