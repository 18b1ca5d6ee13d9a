"""Attention over the tokens of a video, dense and sparse: its time on a CPU or a GPU, and what is lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import median_seconds

from sgl_npu import SparseQuality, explain
from sgl_npu.compiler.sparse_calls import SparseSequence
from sgl_npu.compiler.sparse_quality import measured
from sgl_npu.compiler.sparse_quality import quality as quality_of
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sparse.selection import BLOCK, estimated_blocks, pooled_blocks
from sgl_npu.lowering.sparse.setting import BLOCK_SPARSE, RAIN_FUSION
from sgl_npu.lowering.sparse.tile_order import tiled_order
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.passes.site import SiteRecord
from sgl_npu.runtime.block_attention import block_attention

HEADS, HEAD_SIZE, WIDTH = 12, 128, 64  # the attention of Wan 1.3B; what it is projected from is narrower
GRIDS = ((8, 32, 32), (16, 32, 32))
GPU_GRIDS = ((21, 30, 52),)  # Wan, 81 frames of 832 x 480
SPARSITIES = (0.5, 0.8)
METHODS = (RAIN_FUSION, BLOCK_SPARSE)
Grid = tuple[int, int, int]


class VideoAttention(nn.Module):
    """(1, S, WIDTH) to (1, S, HEADS * HEAD_SIZE). Queries and keys have one projection: what is alike attends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(WIDTH, 3 * HEADS * HEAD_SIZE, bias=False)
        query, key, _ = self.project.weight.data.chunk(3)
        key.copy_(query)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.project(x).unflatten(-1, (3, HEADS, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)


def video_tokens(grid: Grid, dtype: torch.dtype, noise: float = 0.3) -> Tensor:
    """(1, S, WIDTH): a smooth random field over frames, rows and columns, and noise. Near tokens are alike."""
    generator = torch.Generator().manual_seed(1)
    coarse = tuple(max(2, size // 6) for size in grid)
    field = F.interpolate(torch.randn(1, WIDTH, *coarse, generator=generator), grid, mode="trilinear")
    field = field / field.std() + noise * torch.randn(field.shape, generator=generator)
    return (2.0 * field.flatten(2).transpose(1, 2)).to(dtype)


def options_of(method: str, sparsity: float, grid: Grid) -> dict[str, Any]:
    config = {"sparsity": sparsity, "latent_shape": grid}
    return {"attention": method, "attention_config": config, "strict": True}


def kept_blocks(call: AttentionCall, grid: TokenGrid, method: str, sparsity: float) -> Tensor:
    """Which blocks a method selects, as its kernel does."""
    select = pooled_blocks if method == RAIN_FUSION else estimated_blocks
    return select(call, grid, Fraction(str(sparsity)))


@torch.no_grad()
def measure(shape: Grid, dtype: torch.dtype, runs: int, device: str = "cpu") -> list[dict[str, Any]]:
    """A row for each method and sparsity; all variants take turns, on a CPU in CPU seconds of one thread."""
    torch.set_num_threads(1)
    model = VideoAttention().to(device, dtype)
    grid, x = TokenGrid(*shape), video_tokens(shape, dtype).to(device)
    query, key, value = (y.contiguous() for y in model.heads(x))
    call = AttentionCall(query, key, value, scale=HEAD_SIZE**-0.5)
    tiled = tiled_order(grid, x.device)
    in_tiles = AttentionCall(query[:, :, tiled], key[:, :, tiled], value, scale=call.scale)
    given = {RAIN_FUSION: in_tiles, BLOCK_SPARSE: call}
    cases = [(method, sparsity) for method in METHODS for sparsity in SPARSITIES]
    torch._dynamo.reset()
    variants: dict[Any, Callable[[], object]] = {"dense": _compiled(model, {"strict": True}, x)}
    for case in cases:
        variants[case] = _compiled(model, options_of(*case, shape), x)
        variants[("select", *case)] = _selection(given[case[0]], grid, *case)
    if device == "cpu":
        found = median_seconds(variants, runs, time.process_time)
    else:
        found = median_seconds(variants, runs, calls=5)
    rows = []
    for method, sparsity in cases:
        density = kept_blocks(given[method], grid, method, sparsity).float().mean().item()
        rows.append(
            {
                "method": method,
                "dtype": str(dtype).removeprefix("torch."),
                "length": grid.length,
                "sparsity": sparsity,
                "density": density,
                "dense_seconds": found["dense"],
                "seconds": found[method, sparsity],
                "speedup": found["dense"] / found[method, sparsity],
                "of_ideal": found["dense"] * density / found[method, sparsity],
                "selection": found["select", method, sparsity] / found["dense"],
            }
        )
    return rows


@torch.no_grad()
def quality(shape: Grid) -> list[dict[str, Any]]:
    """A row for each method and sparsity: recall and error of its blocks, and of as many random ones, in float32."""
    x, model = video_tokens(shape, torch.float32), VideoAttention()
    rows = []
    for method in METHODS:
        for sparsity in SPARSITIES:
            torch._dynamo.reset()
            report = explain(model, x, options=options_of(method, sparsity, shape))
            (found,) = report.sparse_quality()
            call = _as_the_kernel_gets_it(model, x, TokenGrid(*shape), method)
            random = _measured(call, _random_blocks(found.blocks))
            row = {"method": method, "length": math.prod(shape), "sparsity": sparsity, "density": found.density}
            row |= {"recall": found.recall, "error": found.error_l2}
            rows.append({**row, "random_recall": random.recall, "random_error": random.error_l2})
    return rows


def _as_the_kernel_gets_it(model: VideoAttention, x: Tensor, grid: TokenGrid, method: str) -> AttentionCall:
    order = tiled_order(grid, x.device) if method == RAIN_FUSION else slice(None)
    query, key, value = (y[:, :, order].contiguous() for y in model.heads(x))
    return AttentionCall(query, key, value, scale=HEAD_SIZE**-0.5)


def _random_blocks(blocks: Tensor) -> Tensor:
    """As many in each row."""
    order = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return blocks.gather(-1, order)


def _measured(call: AttentionCall, blocks: Tensor) -> SparseQuality:
    out = block_attention(call.query, call.key, call.value, blocks, call.scale)
    tensors = (x[0] for x in (call.query, call.key, call.value, out, blocks))
    found = measured([SparseSequence(*tensors, (BLOCK, BLOCK), call.scale)])
    assert found is not None
    return quality_of(SiteRecord(0, ""), found, 256, 0)


def _compiled(model: nn.Module, options: dict[str, Any], x: Tensor) -> Callable[[], object]:
    compiled = torch.compile(model, backend="sgl_npu", options=options, fullgraph=True, dynamic=False)
    compiled(x)
    return lambda: compiled(x)


def _selection(call: AttentionCall, grid: TokenGrid, method: str, sparsity: float) -> Callable[[], object]:
    """The choice of blocks alone, compiled by Inductor."""

    def select(query: Tensor, key: Tensor) -> Tensor:
        return kept_blocks(AttentionCall(query, key, key, scale=call.scale), grid, method, sparsity)

    compiled = torch.compile(select, dynamic=False)
    compiled(call.query, call.key)
    return lambda: compiled(call.query, call.key)
