"""What the tests of sparse attention share: calls on a grid, dense attention, and a small Wan."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sparse.token_grid import TokenGrid

GRIDS = [(21, 30, 52), (3, 16, 20), (21, 45, 80), (1, 8, 8), (2, 9, 17), (1, 3, 5), (4, 7, 7)]


def call_on(
    grid: TokenGrid, dtype=torch.float32, batch=1, heads=2, kv_heads=2, dim=32, **options: Any
) -> AttentionCall:
    """Random tensors of the sequence that the grid is in."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, count, grid.length, dim) for count in (heads, kv_heads, kv_heads))
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return AttentionCall(query, key, value, scale=dim**-0.5, inner="eager", **options)


def dense(call: AttentionCall, allowed: Tensor | None = None) -> Tensor:
    """In float64."""
    given = (x.double() for x in (call.query, call.key, call.value))
    return F.scaled_dot_product_attention(*given, allowed, scale=call.scale, enable_gqa=True)


def positions(blocks: Tensor, length: int, size: int = 128) -> Tensor:
    """Which keys each query attends to, of which blocks each block does."""
    return blocks.repeat_interleave(size, 2)[:, :, :length].repeat_interleave(size, 3)[..., :length]


def small_wan(layers: int = 2, heads: int = 2, dim: int = 32) -> torch.nn.Module:
    """A video transformer with self and cross attention, random weights that make attention matter."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": heads, "attention_head_dim": dim, "in_channels": 4, "out_channels": 4}
    widths = {"text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": layers, "rope_max_seq_len": 64}
    return WanTransformer3DModel(patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", **sizes, **widths).eval()


def wan_inputs(
    frames: int, height: int, width: int, batch: int = 1, dtype=torch.float32, seed: int = 0
) -> dict[str, Any]:
    """`height` and `width` in tokens; the patch is 2 x 2."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden_states": random(batch, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 10),
        "encoder_hidden_states": random(batch, 13, 32),
        "return_dict": False,
    }
