"""`torch.nn.attention.varlen.varlen_attn` as the canonical op with a mask of documents.

before: torch_attn::_varlen_attn(q (T, Hq, D), k, v (Tk, Hkv, D), cu_seq_q, cu_seq_k, max_q, max_k, ...)
after:  sgl_npu::packed_attention(q, k, v, [length_at(cu_seq, 1), ..., T], ...)     NPU, cu_seq an input of the graph
        sgl_npu::attention(q (1, Hq, T, D), k, v, same document, ..., band)         otherwise

The lengths are a tensor and the NPU's kernel takes them as a list: where the tensor is an input, it is read before the
graph runs. Elsewhere the mask is a tensor. torch itself has the op on CUDA alone, where its own kernel is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sgl_npu.lowering.ascend_packed import takes_packed
from sgl_npu.lowering.packed import PackedCall
from sgl_npu.passes.capture_record import Capture, note_outcome, other_device
from sgl_npu.passes.site import mark_site
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.length_at import length_at
from sgl_npu.runtime.packed_attention import packed_attention
from sgl_npu.runtime.sizes import Size, specialise

VARLEN_SPELLING = "varlen_attn"
VARLEN_OP = "torch_attn._varlen_attn"


def is_varlen(target: object) -> bool:
    packet = getattr(target, "overloadpacket", target)
    return packet is getattr(torch.ops.torch_attn, "_varlen_attn", None)  # there once the module has been imported


def capture_varlen(node: fx.Node, capture: Capture) -> None:
    record = capture.new_record(node, VARLEN_SPELLING)
    mark_site(node, record)
    if capture.platform == "cuda":
        record.op, record.fused = VARLEN_OP, True
        return
    node.target = canonical_varlen
    same = len(node.args) > 4 and node.args[3] is node.args[4]
    listed = same and capture.platform == "npu" and getattr(node.args[3], "op", "") == "placeholder"
    node.kwargs = {**node.kwargs, "same_lengths": same, "listed": listed, "site": record.id}


def canonical_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    *,
    same_lengths: bool,
    listed: bool,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op through the canonical one; the original where a rule refuses. Returns out, lse (Hq, T) and a seed.

    `same_lengths`: queries and keys have one tensor of lengths, so that the band is one of the whole sequence.
    `listed`: its entries may become numbers.
    """
    reason = _refuse(query, cu_seq_k, seqused_k, block_table)
    note_outcome(site, reason)
    if reason is not None or cu_seq_k is None:
        return torch.ops.torch_attn._varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size, enable_gqa,
            seqused_k, block_table, num_splits,
        )  # fmt: skip
    left, right = window_size or (-1, -1)
    before, upper = None if left < 0 else left, 0 if is_causal else None if right < 0 else right
    lower = None if before is None else -before
    scale = query.size(-1) ** -0.5 if scale is None else scale
    if listed and not torch.is_grad_enabled():
        packed = PackedCall(query, key, value, [query.size(0)], [key.size(0)], scale=scale, before=before, after=upper)
        entries = specialise(cu_seq_q.size(0))  # as many are listed, and the rest as one more sequence
        if takes_packed(packed, entries):
            ends = [*(length_at(cu_seq_q, i) for i in range(1, entries)), query.size(0)]
            out, lse = packed_attention(query, key, value, ends, ends, scale=scale, before=before, after=upper)
            return out, lse.transpose(0, 1), query.new_zeros((2,), dtype=torch.uint64)
    mask = _same_document(query.size(0), key.size(0), cu_seq_q, cu_seq_k)
    if not same_lengths and (lower is not None or upper is not None):
        distance = _positions(key.size(0), cu_seq_k, None) - _positions(query.size(0), cu_seq_q, cu_seq_k)[:, None]
        mask = mask if lower is None else mask & (distance >= lower)
        mask = mask if upper is None else mask & (distance <= upper)
        lower = upper = None
    out, lse = attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),
        mask[None, None],
        scale=scale,
        lower=lower,
        upper=upper,
    )
    return out[0].transpose(0, 1), lse[0], query.new_zeros((2,), dtype=torch.uint64)


def _refuse(query: Tensor, cu_seq_k: Tensor | None, seqused_k: Tensor | None, table: Tensor | None) -> str | None:
    if seqused_k is not None or table is not None or cu_seq_k is None:
        return "seqused_k or block_table: lengths and pages are tensors; sgl_npu.ops.attention takes lists of lengths"
    return other_device(query)


def _documents(tokens: Size, ends: Tensor) -> Tensor:
    """(T,): the document of each token; B where it is behind all of them."""
    return (torch.arange(tokens, device=ends.device)[:, None] >= ends[1:]).sum(-1)


def _same_document(rows: Size, keys: Size, cu_seq_q: Tensor, cu_seq_k: Tensor) -> Tensor:
    """Bool (T, Tk). What is behind all documents belongs to none."""
    row, column = _documents(rows, cu_seq_q)[:, None], _documents(keys, cu_seq_k)
    return (row == column) & (row < cu_seq_q.size(0) - 1)


def _positions(tokens: Size, starts: Tensor, keys: Tensor | None) -> Tensor:
    """(T,): where a token is in its document; among `keys` of the document, whose newest tokens these are."""
    document = _documents(tokens, starts).clamp(max=starts.size(0) - 2)
    position = torch.arange(tokens, device=starts.device) - starts[document]
    if keys is None:
        return position
    shift = (keys[1:] - keys[:-1]) - (starts[1:] - starts[:-1])
    return position + shift[document]
