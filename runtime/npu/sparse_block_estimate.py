"""sgl_npu::sparse_block_estimate: which key blocks matter to each block of queries.

Queries and keys are sampled along the antidiagonals of `stride` x `stride` squares, their softmax is summed over
blocks, and a block of queries keeps the heaviest key blocks until they hold `threshold` of the weight, at most
`row_sparse` of the blocks. The first block, and the last one or the one on the diagonal, are kept on request.

The reference computes in float32 and normalises a causal row over the keys up to the end of its tile of 128 samples;
the hardware accumulates in float16 and takes smaller tiles where there is little work, so that blocks near the
threshold may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sgl_npu.runtime.npu.bnsd_call import BNSD_RULES, KERNEL_DOCS, BnsdCall, describe
from sgl_npu.runtime.npu.kernel_package import require
from sgl_npu.runtime.npu.rule import Rule, reject
from sgl_npu.runtime.npu.sparse_blocks import SPARSE_SIZE, blocks, columns
from sgl_npu.runtime.sizes import guard

OP = "sparse_block_estimate"
SCHEMA = (
    f"{OP}(Tensor query, Tensor key, float scale, bool causal, float threshold=1.0, float row_sparse=1.0,"
    " bool keep_sink=True, bool keep_recent=True, int stride=8, int sparse_size=128)"
    " -> (Tensor sparse_mask, Tensor sparse_count)"
)
MAX_KEYS = 128 * 1024
DIM_MULTIPLE = 16
TILE = 128
# Fewer key blocks than this are never cut down to `row_sparse`; in a causal call 1 or 2 are always all kept.
MIN_CUT_BLOCKS = 10
MIN_RANKED_BLOCKS = 3
_EPSILON = 1e-5
_KERNEL = "sgl-kernel-npu csrc/attentions/csrc/ops/sparse_block_estimate/op_kernel/sparse_block_estimate.h @3f03db0c"
_PLUGIN = "sgl-kernel-npu csrc/attentions/csrc/plugin/sparse_block_estimate.cpp @4d1ad10e"


@dataclass(frozen=True, kw_only=True, eq=False)
class EstimateCall(BnsdCall):
    """Arguments of sparse_block_estimate."""

    causal: bool
    threshold: float = 1.0
    row_sparse: float = 1.0
    stride: int = 8
    sparse_size: int = SPARSE_SIZE


def _fractions(call: EstimateCall) -> str | None:
    for name, fraction in (("threshold", call.threshold), ("row_sparse", call.row_sparse)):
        if not 0 < fraction <= 1:
            return f"{name} = {fraction} is not in (0, 1]"
    return None


def _sparse_size(call: EstimateCall) -> str | None:
    if call.sparse_size != SPARSE_SIZE:
        return f"sparse_size = {call.sparse_size}; block_sparse_attention takes {SPARSE_SIZE}"
    if call.stride < 1 or call.sparse_size % call.stride:
        return f"stride = {call.stride} does not divide sparse_size = {call.sparse_size}"
    return None


def _dim(call: EstimateCall) -> str | None:
    return f"D = {call.dim} is not a multiple of {DIM_MULTIPLE}" if guard(call.dim % DIM_MULTIPLE != 0) else None


def _keys(call: EstimateCall) -> str | None:
    if guard(call.keys < call.stride) or guard(call.keys > MAX_KEYS):
        return f"Skv = {call.keys} is not in stride = {call.stride}..{MAX_KEYS}"
    return None


def _enough_keys(call: EstimateCall) -> str | None:
    if call.causal and guard(call.keys < call.rows):
        return f"causal = True with S = {call.rows} and Skv = {call.keys}; the kernel reads S keys"
    return None


def _columns(call: EstimateCall) -> str | None:
    if guard(columns(call.rows, call.sparse_size) != columns(call.keys, call.sparse_size)):
        return (
            f"S = {call.rows} and Skv = {call.keys} need different numbers of mask columns; "
            "releases to 2026-08-21 size the mask by S alone"
        )
    return None


def _cut(call: EstimateCall) -> str | None:
    count = blocks(call.keys, call.sparse_size)
    if call.row_sparse == 1 or not guard(count >= MIN_CUT_BLOCKS):
        return None
    fewest = MIN_CUT_BLOCKS if call.causal else count
    if guard(fewest * call.row_sparse < 1):
        return f"row_sparse = {call.row_sparse} keeps none of {fewest} key blocks; it must keep one"
    return None


ESTIMATE_RULES: tuple[Rule, ...] = (
    *BNSD_RULES,
    Rule("fractions", KERNEL_DOCS, _fractions),
    Rule("sparse_size", KERNEL_DOCS, _sparse_size, gate=True),
    Rule("dim", _KERNEL, _dim),
    Rule("keys", _KERNEL, _keys),
    Rule("enough_keys", _KERNEL, _enough_keys),
    Rule("columns", _PLUGIN, _columns),
    Rule("cut", KERNEL_DOCS, _cut),
)


def _check(query: torch.Tensor, key: torch.Tensor, **settings: object) -> None:
    reject(OP, EstimateCall(**describe(query, key), **settings), ESTIMATE_RULES)  # type: ignore[arg-type]


def _block_scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, causal: bool, stride: int, sparse_size: int
) -> torch.Tensor:
    """(B, N, query blocks, key blocks): the softmax over samples, summed over each pair of blocks."""
    rows, keys, heads = query.shape[2], key.shape[2], query.shape[1]
    key = key.float()[:, :, : keys // stride * stride].repeat_interleave(heads // key.shape[1], 1)
    query = F.pad(query.float(), (0, 0, 0, -rows % stride))
    sampled_query = query.unflatten(2, (-1, stride)).flip(3).flatten(3)
    sampled_key = key.unflatten(2, (-1, stride)).flatten(3)
    scores = sampled_query @ sampled_key.transpose(2, 3) * (scale / stride)
    if causal:
        sample = torch.arange(scores.shape[2])
        tile_end = ((sample // TILE + 1) * TILE * stride).clamp(max=rows) // stride
        scores = scores.masked_fill(torch.arange(scores.shape[3]) >= tile_end[:, None], -torch.inf)
    # A causal call shorter than the stride has no key sample: its rows are 0 / 0 and always all kept.
    weights = scores.softmax(-1).nan_to_num(0.0)
    per_block = sparse_size // stride
    counts = blocks(rows, sparse_size), blocks(keys, sparse_size)
    tail = [count * per_block - size for count, size in zip(counts, weights.shape[2:], strict=True)]
    weights = F.pad(weights, (0, tail[1], 0, tail[0]))
    return weights.unflatten(3, (-1, per_block)).sum(4).unflatten(2, (-1, per_block)).sum(3)


def _select(score: torch.Tensor, threshold: float, row_sparse: float, keep_sink: bool, keep_last: bool) -> torch.Tensor:
    """Which of the blocks (..., n) to keep; the kept ends take no part in the ranking."""
    count = score.shape[-1]
    score = score.clone()
    if keep_last:
        score[..., -1] = 0
    if keep_sink:
        score[..., 0] = 0
    ordered = score.sort(-1, descending=True).values
    cut = torch.full(score.shape[:-1], count)
    lowest = torch.zeros(score.shape[:-1])
    if threshold < 1:
        enough = threshold * score.sum(-1, keepdim=True)
        cut = (ordered.cumsum(-1) < enough).sum(-1).clamp(max=count - 1)
        lowest = ordered.gather(-1, cut[..., None]).squeeze(-1)
    if count >= MIN_CUT_BLOCKS:
        most = (torch.tensor(row_sparse, dtype=torch.float32) * count).item()
        lowest = torch.where(cut > most, ordered[..., int(most) - 1], lowest)
    kept = score > (lowest - _EPSILON)[..., None]
    # The kernel sets the first column last, whatever keep_sink says.
    kept[..., 0] = True
    if keep_last:
        kept[..., -1] = True
    return kept


@torch.no_grad()
def sparse_block_estimate(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    causal: bool,
    threshold: float = 1.0,
    row_sparse: float = 1.0,
    keep_sink: bool = True,
    keep_recent: bool = True,
    stride: int = 8,
    sparse_size: int = SPARSE_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CPU kernel: the mask and its row sums, as block_sparse_attention takes them. `scale` is the attention's."""
    _check(query, key, causal=causal, threshold=threshold, row_sparse=row_sparse, stride=stride,
           sparse_size=sparse_size)  # fmt: skip
    scores = _block_scores(query, key, scale, causal, stride, sparse_size)
    mask = torch.zeros(*scores.shape[:3], columns(key.shape[2], sparse_size), dtype=torch.int8)
    for row in range(scores.shape[2]):
        count = row + 1 if causal else scores.shape[3]
        if causal and count < MIN_RANKED_BLOCKS:
            mask[:, :, row, :count] = 1
        else:
            ranked = scores[:, :, row, :count]
            mask[:, :, row, :count] = _select(ranked, threshold, row_sparse, keep_sink, keep_recent or not causal)
    return mask, mask.sum(-1, dtype=torch.int32)


def sparse_block_estimate_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    causal: bool,
    threshold: float = 1.0,
    row_sparse: float = 1.0,
    keep_sink: bool = True,
    keep_recent: bool = True,
    stride: int = 8,
    sparse_size: int = SPARSE_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes, sizes possibly symbolic."""
    rows = (*query.shape[:2], blocks(query.shape[2], sparse_size))
    mask = query.new_empty((*rows, columns(key.shape[2], sparse_size)), dtype=torch.int8)
    return mask, query.new_empty(rows, dtype=torch.int32)


def sparse_block_estimate_npu(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    causal: bool,
    threshold: float = 1.0,
    row_sparse: float = 1.0,
    keep_sink: bool = True,
    keep_recent: bool = True,
    stride: int = 8,
    sparse_size: int = SPARSE_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NPU kernel: sgl-kernel-npu's, whose scale is per sample."""
    _check(query, key, causal=causal, threshold=threshold, row_sparse=row_sparse, stride=stride,
           sparse_size=sparse_size)  # fmt: skip
    return require(OP)(
        query=query.contiguous(),
        key=key.contiguous(),
        input_layout="BNSD",
        stride=stride,
        sparse_size=sparse_size,
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale_value=scale / stride,
        threshold=threshold,
        causal=causal,
        keep_sink=keep_sink,
        keep_recent=keep_recent,
        row_sparse=row_sparse,
    )
