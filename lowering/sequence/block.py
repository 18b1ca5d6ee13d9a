"""One call of the canonical op inside a scheme, several of them merged, and one message of several tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall, open_band
from sgl_npu.lowering.sequence.ascend_merge import refuse_update, update
from sgl_npu.lowering.sequence.merge import Part, merge
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import Size


def attend(call: AttentionCall) -> Part:
    """The canonical op on the tensors of the call, without the sides of the band that exclude nothing."""
    call = open_band(call)
    tensors = call.query, call.key, call.value, call.mask, call.bias, call.sinks
    out, lse = attention(*tensors, scale=call.scale, softcap=call.softcap, lower=call.lower, upper=call.upper)
    return Part(out, lse)


def attend_to(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    upper: Size | None = None,
) -> Part:
    """Attention of some queries to some keys with the scale and softcap of the call, and no more of it than that."""
    block = replace(call, query=query, key=key, value=value, mask=mask, bias=None, sinks=None)
    return attend(block.with_band(None, upper))


def merged(call: AttentionCall, parts: list[Part]) -> Part:
    """What attention to disjoint sets of keys gives together, by the op that the platform has for it."""
    if call.platform == "npu" and len(parts) > 1 and refuse_update(parts) is None:
        return update(parts, has_strides=call.inner != "torchair")
    return merge(parts)


def result(call: AttentionCall, part: Part) -> tuple[Tensor, Tensor | None]:
    """What a scheme returns."""
    return part.out.to(call.query.dtype), part.lse if call.needs_lse else None


def message_order(call: AttentionCall, x: Tensor, dim: int = 1) -> Tensor:
    """Keys or values (B, H, S, D) in the order that a message has them in, and back. `dim` is that of H.

    (B, S, H, D) is the order of most models, and the kernels of NPU and CUDA take it as it is. That of the CPU is up to
    a fifth faster where the rows of a head lie together (bfloat16, 4096 keys, torch 2.13); one copy makes either.
    """
    return x if call.platform == "cpu" else x.transpose(dim, dim + 1)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """One flat message."""
    return torch.cat([x.reshape(x.numel()) for x in tensors])


def unpack(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a message, as views of it."""
    parts = message.split([x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]
