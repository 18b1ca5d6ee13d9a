"""CPU and CUDA under Inductor: FlexAttention, for windows and softcap, computing only the blocks that the band touches.

FlexAttention's function compiles itself and cannot be traced into a graph that is past Dynamo, so this file builds the
higher-order op it ends in, as in torch 2.13: `flex_attention(query, key, value, score_mod, block_mask, scale,
kernel_options, score buffers, mask buffers)`.

On CPU the op gives no lse, and in bfloat16 it is many times slower than in float32 (measured: 4096 tokens, window 256,
4188 ms against 132 ms), so half precision goes through float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sgl_npu.lowering.kernel import AttentionCall, Kernel, head_counts, is_empty, open_band
from sgl_npu.runtime.sizes import Size

BLOCK = 128
_KNOWN_OP = "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters
_KERNEL_OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": False,
    "OUTPUT_MAX": False,
}


def _refuse(call: AttentionCall) -> str | None:
    if reason := refuse_here(call):
        return reason
    call = open_band(call)
    if not all(side is None or isinstance(side, int) for side in (call.lower, call.upper)):
        return f"band ({call.lower}, {call.upper}) depends on symbolic lengths: Inductor's CPU kernel takes constants"
    if call.mask is not None or call.bias is not None:
        return "a mask tensor is left beside the band; one call with a combined mask serves it"
    if call.sinks is not None or call.needs_lse:
        return "sinks or a used lse: FlexAttention gives no lse on CPU"
    return "an empty batch, query or key" if is_empty(call) else None


def refuse_here(call: AttentionCall) -> str | None:
    """Why this torch, inner compiler, machine or dtype has no fused FlexAttention."""
    if not _KNOWN_OP:
        return "FlexAttention's op is known here as torch 2.13 has it; this torch is older"
    if call.inner != "inductor":
        return f"inner compiler {call.inner!r}: FlexAttention is fused by Inductor alone"
    if call.query.device.type == "cpu":
        if call.query.dtype == torch.float64:
            return "query is float64: FlexAttention on CPU takes float32 and less"
        if not torch.cpu._is_avx2_supported():
            return "no AVX2: FlexAttention on CPU needs it"
    return None


def _emit(call: AttentionCall) -> tuple[Tensor, None]:
    call = open_band(call)
    return flex(call, *_blocks(call), _band_test(call)), None


def _kernel_options(call: AttentionCall, all_rows: bool) -> dict[str, Any]:
    """`all_rows`: every row has a key. On Hopper the kernel that loads by TMA is faster (H100, torch 2.11: 470 against
    410 TFLOP/s)."""
    options = {**_KERNEL_OPTIONS, "ROWS_GUARANTEED_SAFE": all_rows}
    device = call.query.device
    if device.type == "cuda" and torch.cuda.is_available():
        options["USE_TMA"] = torch.cuda.get_device_capability(device) >= (9, 0)
    return options


def flex(call: AttentionCall, count: Tensor, index: Tensor, allowed: Callable[..., Tensor] | None) -> Tensor:
    """FlexAttention over listed key blocks of 128, with the scale and softcap of the call.

    `count` (B or 1, H or 1, query blocks) says how many of the key blocks in `index`, one dimension more, are computed;
    `allowed` is the test of single positions in them, None if there is none to make.
    """
    dtype = call.query.dtype
    listed: dict[str, Any] = {"kv_num_blocks": count, "kv_indices": index, "mask_mod": allowed}
    if allowed is None:
        partial = torch.zeros_like(count)
        listed |= {"kv_num_blocks": partial, "full_kv_num_blocks": count, "full_kv_indices": index}
    query, key, value = call.query, call.key, call.value
    if query.device.type == "cuda":
        head_counts(call)  # the lowering to Triton fails on symbols (torch 2.11 and 2.13)
    else:
        query, key, value = (_float32(x) for x in (query, key, value))
    block_mask = BlockMask.from_kv_blocks(
        **listed,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(query.size(2), key.size(2)),
        compute_q_blocks=False,
    )
    out = torch.ops.higher_order.flex_attention(
        query,
        key,
        value,
        _softcap(call.softcap),
        block_mask.as_tuple(),
        call.scale,
        _kernel_options(call, allowed is None),
        (),
        (),
    )[0]
    return out.to(dtype)


def _float32(x: Tensor) -> Tensor:
    """A copy in any case: the C++ kernel reads sizes off the buffer, which a view of a matrix would be (torch 2.13)."""
    if x.dtype == torch.float32:
        return x.clone(memory_format=torch.contiguous_format)
    return x.to(torch.float32)


def _softcap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, *_: Any) -> Tensor:
        return torch.tanh(score / softcap) * softcap if softcap > 0.0 else score

    return cap


def _band_test(call: AttentionCall) -> Callable[..., Tensor]:
    lower, upper = call.lower, call.upper

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = j >= 0
        kept = kept if lower is None else kept & (j - i >= lower)
        return kept if upper is None else kept & (j - i <= upper)

    return allowed


def _blocks(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block touches, (1, 1, Q), and which, (1, 1, Q, K), from the band's sides alone.

    Query block a has rows 128 a to 128 a + 127, so its keys start at block a + lower // 128 and end at block
    a + (upper + 127) // 128.
    """
    device = call.query.device
    keys = _ceil(call.key.size(2))
    row = torch.arange(_ceil(call.query.size(2)), dtype=torch.int32, device=device)
    first, last = torch.zeros_like(row), torch.full_like(row, keys - 1)
    if call.lower is not None:
        first = (row + call.lower // BLOCK).clamp(min=0)
    if call.upper is not None:
        last = (row + (call.upper + BLOCK - 1) // BLOCK).clamp(max=keys - 1)
    count = (last - first + 1).clamp(min=0)
    index = (first.unsqueeze(-1) + torch.arange(keys, dtype=torch.int32, device=device)).clamp(max=keys - 1)
    return count.to(torch.int32)[None, None], index.to(torch.int32)[None, None]


def _ceil(size: Size) -> Size:
    return (size + BLOCK - 1) // BLOCK


def _has_window_or_softcap(call: AttentionCall) -> bool:
    """Other kernels are faster for the rest."""
    return open_band(call).lower is not None or call.softcap > 0.0


FLEX = Kernel("flex", "flex_attention", _refuse, _emit, _has_window_or_softcap)
