"""sgl_npu::block_attention: attention over the key blocks that a mask selects for each block of queries.

For graphs that run op by op: computes nothing but what is selected, one block of queries after the other. Under
Inductor FlexAttention does the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "sgl_npu::block_attention"

torch.library.define(
    NAME,
    "(Tensor query, Tensor key, Tensor value, Tensor blocks, float scale, int size=128) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def block_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float, size: int = 128) -> Tensor:
    """Attention of query (B, Hq, S, D) to key and value (B, Hkv, S, D) and (B, Hkv, S, Dv); returns (B, Hq, S, Dv).

    `blocks`: bool (B, Hq, query blocks, key blocks), True where a block of `size` keys takes part. Every block of
    queries must select at least one.
    """
    return torch.ops.sgl_npu.block_attention.default(query, key, value, blocks, scale, size)


@torch.library.impl(NAME, "CompositeExplicitAutograd")
@torch.no_grad()
def _block_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float, size: int = 128
) -> Tensor:
    batch, heads, length = query.shape[:3]
    group = heads // key.size(1)
    out = query.new_empty(batch, heads, length, value.size(3))
    columns = torch.arange(size, device=key.device)
    for b in range(batch):
        for h in range(heads):
            k, v = key[b, h // group], value[b, h // group]
            for number, selected in enumerate(blocks[b, h].unbind(0)):
                index = (selected.nonzero() * size + columns).flatten()
                index = index[index < k.size(0)]
                rows = slice(number * size, min((number + 1) * size, length))
                q, selected_k, selected_v = (x[None, None] for x in (query[b, h, rows], k[index], v[index]))
                out[b, h, rows] = F.scaled_dot_product_attention(q, selected_k, selected_v, scale=scale)[0, 0]
    return out


@torch.library.register_fake(NAME)
def _block_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float, size: int = 128
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.size(3))
