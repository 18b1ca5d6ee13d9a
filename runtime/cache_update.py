"""The op `sgl_npu::update_kv_cache`: new keys and values go to their slots of a paged cache, in place.

    update_kv_cache(key_cache, value_cache, key, value, slot_mapping, padded)

    key_cache (N, P, Hkv, D)   value_cache (N, P, Hkv, Dv)   key (T, Hkv, D)   value (T, Hkv, Dv)   slot_mapping (T,)

Slot `b * P + i` is row i of block b. A token whose slot is negative is padding and goes nowhere: shapes stay what they
are, as captured graphs need it. The slots of the others differ from each other. `padded` False says that no slot is
negative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sgl_npu.runtime.sizes import guard

OP_NAME = "sgl_npu::update_kv_cache"

# What puts rows (T, Hkv, D) at places (T, 2), block and row, of a cache (N, P, Hkv, D): in place, or in a new cache.
Scatter = Callable[[Tensor, Tensor, Tensor], Tensor]

torch.library.define(
    OP_NAME,
    "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor slot_mapping, "
    "bool padded=True) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)

update_kv_cache = torch.ops.sgl_npu.update_kv_cache.default


def write_rows(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    padded: bool,
    scatter: Scatter,
) -> None:
    """The op in terms of a scatter that takes no negative slot.

    A padding token repeats the token of the highest slot: the same row is written twice to the same place. Where all
    tokens are padding, slot 0 gets what it holds.
    """
    check_update(key_cache, value_cache, key, value, slot_mapping)
    if guard(slot_mapping.size(0) == 0):
        return
    slots, source = slot_mapping.long(), None
    if padded:
        kept = slots >= 0
        highest, token = slots.max(0, keepdim=True)
        slots = torch.where(kept, slots, highest.clamp(min=0))
        source = torch.where(kept, torch.arange(slots.size(0), device=slots.device), token)
        any_kept = (highest >= 0).view(1, 1, 1)
    places = torch.stack((slots // key_cache.size(1), slots % key_cache.size(1)), -1)
    for cache, rows in ((key_cache, key), (value_cache, value)):
        if source is not None:
            rows = torch.where(any_kept, rows.index_select(0, source), cache[0, :1])
        updated = scatter(cache, places, rows)
        if updated is not cache:
            cache.copy_(updated)


def check_update(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    """Raise ValueError for shapes and dtypes outside the contract of the op."""
    for name, cache, tokens in (("key", key_cache, key), ("value", value_cache, value)):
        shapes = f"{name}_cache {tuple(cache.shape)}, {name} {tuple(tokens.shape)}"
        if cache.dim() != 4 or tokens.dim() != 3:
            raise ValueError(
                f"{OP_NAME}: {name}_cache must be (blocks, block_size, Hkv, D) and {name} (tokens, Hkv, D); "
                f"got {shapes}"
            )
        if guard(cache.size(2) != tokens.size(1)) or guard(cache.size(3) != tokens.size(2)):
            raise ValueError(f"{OP_NAME}: {name}_cache and {name} differ in heads or head size: {shapes}")
        if cache.dtype != tokens.dtype:
            raise ValueError(f"{OP_NAME}: {name}_cache is {cache.dtype} and {name} {tokens.dtype}; they must agree")
        if not cache.is_contiguous():
            raise ValueError(f"{OP_NAME}: {name}_cache has strides {cache.stride()}; it must be contiguous")
    if slot_mapping.dim() != 1 or slot_mapping.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{OP_NAME}: slot_mapping must be int32 or int64 (tokens,), "
            f"got {slot_mapping.dtype} {tuple(slot_mapping.shape)}"
        )
    for name, size in (("key", key.size(0)), ("value", value.size(0))):
        if guard(size != slot_mapping.size(0)):
            raise ValueError(f"{OP_NAME}: {name} has {size} tokens but slot_mapping {slot_mapping.size(0)}")
    pages = key_cache.shape[:2], value_cache.shape[:2]
    if any(guard(a != b) for a, b in zip(*pages, strict=True)):
        raise ValueError(f"{OP_NAME}: key_cache and value_cache differ in blocks: {tuple(pages[0])}, {tuple(pages[1])}")


def _index_put(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    return cache.index_put_(places.unbind(-1), rows)


@torch.library.impl(OP_NAME, "CompositeImplicitAutograd")
def _kernel(key_cache, value_cache, key, value, slot_mapping, padded=True):
    write_rows(key_cache, value_cache, key, value, slot_mapping, padded, _index_put)
