"""Which input_layout costs the fewest copies, and the tensors in it.

Attention is (B, N, S, D) in name; in memory models mostly have (B, S, N, D), the projections' own order. The kernels
want contiguous tensors and take either order, so the order that the tensors already have is free.
BSH would be BSND with its last two dimensions merged: never cheaper, so it is not used.
"""

from __future__ import annotations

from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.runtime.sizes import guard


def input_layout(call: AttentionCall) -> str:
    """BSND or BNSD, whichever more of query, key and value are contiguous in."""
    tensors = (call.query, call.key, call.value)
    free_bsnd = sum(x.transpose(1, 2).is_contiguous() for x in tensors)
    free_bnsd = sum(x.is_contiguous() for x in tensors)
    return "BSND" if free_bsnd >= free_bnsd else "BNSD"


def full_layout(call: AttentionCall, layout: str) -> str:
    """The layout with the order that `out` is wanted in (the query's); with one query row both orders are the same."""
    wanted = "BSND" if guard(call.query.stride(1) < call.query.stride(2)) else "BNSD"
    return layout if wanted == layout or guard(call.query.size(2) == 1) else f"{layout}_{wanted}"


def to_layout(x: Tensor, layout: str) -> Tensor:
    """(B, N, S, D) as a contiguous tensor in the layout."""
    return (x.transpose(1, 2) if layout == "BSND" else x).contiguous()


def from_layout(out: Tensor, layout: str) -> Tensor:
    """The kernel's output as (B, N, S, D)."""
    return out.transpose(1, 2) if layout.rsplit("_", 1)[-1] == "BSND" else out
