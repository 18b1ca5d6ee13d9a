"""npu_fusion_attention_v3 without an NPU: shapes for tracing, numbers on the CPU (forward only)."""

from __future__ import annotations

import torch

from sgl_npu.runtime.npu.fia_call import INT_MAX
from sgl_npu.runtime.npu.fia_mask_rules import COMPRESSED_MODES
from sgl_npu.runtime.npu.fusion_rules import FusionAttentionCall
from sgl_npu.runtime.npu.layouts import AxisSizes, build_shape, read_sizes, view_bnsd
from sgl_npu.runtime.npu.rules import reject_violations
from sgl_npu.runtime.npu.sequence_attention import attend, outside_band, require_compressed_pattern

OP = "npu_fusion_attention_v3"
# The kernel writes each statistic eight times, one block of its vector unit.
STATISTIC_COPIES = 8

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def fusion_attention_v3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = INT_MAX,
    next_tockens: int = INT_MAX,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: torch.Tensor | None = None,
    actual_seq_kvlen: torch.Tensor | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
) -> Outputs:
    """CPU kernel. Query, key and value are float16, bfloat16 or float32 in the axes of `input_layout`.

    Returns (out like query with value's head size, softmax maximum and sum as float32 (B, N, S1, 8) in eight
    equal copies, an empty reserve, seed and offset of the dropout as int64 (1,), always 0). The log-sum-exp
    is maximum + log(sum). A row without any key left gives out 0, sum 0 and the smallest float32 as maximum.
    Without a mask the sparse mode is ignored, as on the hardware. Raises RuntimeError with every rule of
    `rules.FUSION_ATTENTION_RULES` that is broken.
    """
    call = FusionAttentionCall.of(
        query,
        key,
        value,
        atten_mask=atten_mask,
        pse=pse,
        layout=input_layout,
        head_num=head_num,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tockens,
        next_tokens=next_tockens,
        keep_prob=keep_prob,
        others={
            "padding_mask": padding_mask,
            "prefix": prefix,
            "actual_seq_qlen": actual_seq_qlen,
            "actual_seq_kvlen": actual_seq_kvlen,
            "softmax_layout": softmax_layout,
            "sink": sink,
        },
    )
    reject_violations(OP, call)
    outputs = fusion_attention_v3_fake(query, key, value, head_num, input_layout)
    out, maximum, total, _, seed, offset = outputs
    seed.zero_()
    offset.zero_()
    q = view_bnsd(query, input_layout, head_num)
    k, v = (view_bnsd(tensor, input_layout, call.kv_heads) for tensor in (key, value))
    out_view = view_bnsd(out, input_layout, head_num)
    removed = _removed(call, atten_mask, query.device)
    for batch in range(q.shape[0]):
        result = attend(
            q[batch],
            k[batch],
            v[batch],
            scale=scale,
            bias=None if pse is None else pse[batch if pse.shape[0] > 1 else 0],
            removed=None if removed is None else removed[batch if removed.shape[0] > 1 else 0],
        )
        out_view[batch] = result.out.to(out.dtype)
        maximum[batch] = result.maximum.clamp_min(torch.finfo(torch.float32).min)
        total[batch] = result.total
    return outputs


def _removed(call: FusionAttentionCall, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """(1 or B, 1 or N, S1, S2) bool, True where a key takes no part; None if all do."""
    if mask is None:
        return None
    rows, keys = call.q.length, call.k.length
    band = outside_band(call.sparse_mode, rows, keys, call.pre_tokens, call.next_tokens, device)
    if call.sparse_mode in COMPRESSED_MODES:
        require_compressed_pattern(OP, mask)
        return None if band is None else band[None, None]
    dense = mask.bool().view(-1, *mask.shape[-3:]) if mask.dim() == 4 else mask.bool()[None, None]
    return dense if band is None else dense | band


def fusion_attention_v3_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *_: object,
    **__: object,
) -> Outputs:
    """Uninitialised outputs of the right shapes and dtypes, sizes possibly symbolic.

    Like the fake kernel of torch_npu 2.13.0 it checks nothing.
    """
    sizes = read_sizes(input_layout, tuple(query.shape), head_num)
    kv_heads = key.shape[2] // sizes.dim if "H" in input_layout else 1
    value_dim = value.shape[-1] // kv_heads
    out = query.new_empty(build_shape(input_layout, sizes._replace(dim=value_dim)))
    axes = "TND" if "T" in input_layout else "BNSD"
    statistics = build_shape(axes, AxisSizes(*sizes[:3], dim=STATISTIC_COPIES))
    return (
        out,
        query.new_empty(statistics, dtype=torch.float32),
        query.new_empty(statistics, dtype=torch.float32),
        query.new_empty(0),
        query.new_empty(1, dtype=torch.int64),
        query.new_empty(1, dtype=torch.int64),
    )


def no_backward(ctx: object, *gradients: torch.Tensor) -> None:
    """The backward of the emulation: there is none. Raises RuntimeError."""
    raise RuntimeError(f"{OP}: the backward is not covered by the emulation")
