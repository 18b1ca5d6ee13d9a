"""Small models whose sequence is spread over ranks on the stand-in, and how often their graphs should communicate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import sgl_npu
from sgl_npu import Parallel

HEADS, KV_HEADS, SIZE, WIDTH, TEXT = 8, 4, 32, 128, 12


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, SIZE)).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Causal(nn.Module):
    """A block of a language model: RMSNorm, rotary positions, fewer heads of keys than of queries, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, n * SIZE) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.out, self.up, self.down = nn.Linear(HEADS * SIZE, WIDTH), nn.Linear(WIDTH, 192), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.size(1), device=x.device)[:, None] / 100 ** torch.linspace(0, 1, SIZE, device=x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        y = self.norm(x)
        query, key = (_rotated(_split(f(y), n), cos, sin) for f, n in ((self.query, HEADS), (self.key, KV_HEADS)))
        value = _split(self.value(y), KV_HEADS)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Joint(nn.Module):
    """Text and image attend to both together, as in Flux."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(WIDTH, 3 * HEADS * SIZE)
        self.text_out, self.image_out = nn.Linear(HEADS * SIZE, WIDTH), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        parts = [project(F.layer_norm(x, (WIDTH,))) for project, x in ((self.text, text), (self.image, image))]
        query, key, value = (_split(x, HEADS) for x in torch.cat(parts, 1).chunk(3, -1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        length = text.size(1)
        return image + self.image_out(attended[:, length:]), text + self.text_out(attended[:, :length])


class Cross(nn.Module):
    """Attention of the image to itself, then to a text that every rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.itself, self.query = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(WIDTH, HEADS * SIZE)
        self.text = nn.Linear(WIDTH, 2 * HEADS * SIZE)
        self.out, self.cross_out = nn.Linear(HEADS * SIZE, WIDTH), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (_split(x, HEADS) for x in self.itself(F.layer_norm(image, (WIDTH,))).chunk(3, -1))
        image = image + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        key, value = (_split(x, HEADS) for x in self.text(text).chunk(2, -1))
        query = _split(self.query(F.layer_norm(image, (WIDTH,))), HEADS)
        return image + self.cross_out(
            F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        ), text


class Layers(nn.Module):
    """Two blocks; what they pass on is what they take, and the image alone is the answer."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, *inputs: Tensor) -> Tensor:
        inner = self.first(*inputs)
        result = self.second(*(inner if isinstance(inner, tuple) else (inner,)))
        return result[0] if isinstance(result, tuple) else result


BLOCKS: dict[str, type[nn.Module]] = {"causal": Causal, "joint": Joint, "cross": Cross}


@dataclass(frozen=True)
class Counts:
    """Per layer: exchanges (all-to-all, also a shift of the ring), gathers of keys and values, calls of the kernel,
    merges of what those give. Beside those the result is gathered once.
    """

    exchanges: int
    gathers: int
    calls: int
    merges: int = 0


# A second attention of the layer, to the text, needs no communication.
DEGREES = {
    "ulysses 2": Parallel(ulysses=2),
    "ring 2": Parallel(ring=2),
    "kv_gather 2": Parallel(kv_gather=2),
    "ulysses 4": Parallel(ulysses=4),
    "ring 4": Parallel(ring=4),
    "kv_gather 4": Parallel(kv_gather=4),
    "ulysses 2 x ring 2": Parallel(ulysses=2, ring=2),
    "ulysses 2 x kv_gather 2": Parallel(ulysses=2, kv_gather=2),
}
COUNTS = {
    "causal": {
        "ulysses 2": Counts(2, 0, 1),
        "ring 2": Counts(1, 0, 2, 2),
        "kv_gather 2": Counts(0, 1, 3, 2),
        "ulysses 4": Counts(2, 0, 1),
        "ring 4": Counts(3, 0, 4, 6),
        "kv_gather 4": Counts(0, 1, 3, 2),
        "ulysses 2 x ring 2": Counts(3, 0, 2, 2),
        "ulysses 2 x kv_gather 2": Counts(2, 1, 3, 2),
    },
    "joint": {
        "ulysses 2": Counts(2, 0, 1),
        "ring 2": Counts(1, 0, 2, 1),
        "kv_gather 2": Counts(0, 1, 1),
        "ulysses 4": Counts(2, 0, 1),
        "ring 4": Counts(3, 0, 4, 3),
        "kv_gather 4": Counts(0, 1, 1),
        "ulysses 2 x ring 2": Counts(3, 0, 2, 1),
        "ulysses 2 x kv_gather 2": Counts(2, 1, 1),
    },
    "cross": {
        "ulysses 2": Counts(2, 0, 2),
        "ring 2": Counts(1, 0, 3, 1),
        "kv_gather 2": Counts(0, 1, 2),
        "ulysses 4": Counts(2, 0, 2),
        "ring 4": Counts(3, 0, 5, 3),
        "kv_gather 4": Counts(0, 1, 2),
        "ulysses 2 x ring 2": Counts(3, 0, 3, 1),
        "ulysses 2 x kv_gather 2": Counts(2, 1, 2),
    },
}


def on_ranks(count: int) -> list[tuple[str, str]]:
    """Every model with all its degrees that make so many ranks."""
    return [(model, degrees) for model, rows in COUNTS.items() for degrees in rows if DEGREES[degrees].ranks == count]


def cases() -> Iterator[tuple[str, str, bool]]:
    """Models, degrees, and whether lengths are symbols. Four ranks of one scheme are tried with one model."""
    for model, rows in COUNTS.items():
        for degrees in rows:
            if model == "causal" or not degrees.endswith(" 4"):
                yield model, degrees, True
            if model == "causal" and degrees.endswith(" 2"):
                yield model, degrees, False


def build(model: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Layers(BLOCKS[model]).to(torch.float16)


def inputs(model: str, length: int) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(length)
        shapes = [(1, length, WIDTH)] + ([] if model == "causal" else [(1, TEXT, WIDTH)])
        return [torch.randn(shape).to(torch.float16) for shape in shapes]


@contextmanager
def world(size: int) -> Iterator[None]:
    """This process as rank 1 of that many; the others are not there, and what comes from them is undefined."""
    dist.init_process_group("cpu:fake,npu:fake", rank=1, world_size=size, store=FakeStore())
    try:
        # It compares this graph with those of ranks that are not there.
        with patch("sgl_npu.compiler.backend.check_same_graph"):
            yield
    finally:
        dist.destroy_process_group()


def check(model: str, degrees: str, inner: str, inner_options: dict[str, Any], lengths: Sequence[int]) -> list[Tensor]:
    """One graph for all lengths, and every attention a FIA call. Returns what this rank computed."""
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    options = {"inner": inner, "inner_options": inner_options, "parallel": DEGREES[degrees], "strict": True}
    compiled = torch.compile(build(model).to("npu"), backend="sgl_npu", dynamic=len(lengths) > 1, options=options)
    results = []
    for length in lengths:
        given = inputs(model, length)
        with torch.no_grad():
            results.append(compiled(*(x.to("npu") for x in given)).cpu())
        assert results[-1].shape == given[0].shape
    (report,) = sgl_npu.reports()[before:]
    sites = 4 if model == "cross" else 2
    assert [site.op for site in report.sites] == ["npu.npu_fused_infer_attention_score"] * sites
    assert report.graph.count(" = npu.npu_attention_update(") == 2 * COUNTS[model][degrees].merges
    return results
