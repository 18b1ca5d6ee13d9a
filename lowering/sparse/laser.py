"""NPU: laser attention, an exact dense kernel for long sequences, in float16 whatever the model's dtype.

Lengths are padded to 256 and heads to 128, and the padded keys take no part. The kernel keeps its scores in float16, so
what comes in another dtype is scaled into its range first, by powers of two per head:

    value   divided by a factor that the result is multiplied with again: exact
    key     divided by a factor that the query is multiplied with, beside the attention's scale: exact
    query   rows whose scores may pass 60000, by |q| |k|, are divided by what brings them there. Such a row puts all its
            weight on its highest key before and after, and float16 has no finer scores for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.runtime.npu.bnsd_call import describe
from sgl_npu.runtime.npu.laser_attention import HEAD_DIM, LASER_RULES, LENGTH_MULTIPLE, LaserCall
from sgl_npu.runtime.npu.package_ops import ensure_package_ops
from sgl_npu.runtime.npu.rule import broken_rules
from sgl_npu.runtime.sizes import Size, known

LASER_OP = "sgl_npu.laser_attention"
MIN_LENGTH = 2048  # SGLang's laser_attn.py: below, dense attention is faster
_HIGHEST_SCORE = 60000.0  # of 65504
_VALUE_RANGE = 2.0**14
_KEY_RANGE = 2.0**4  # leaves the query its range: it takes the key's factor


def refuse_laser(call: AttentionCall) -> str | None:
    """The clause of the kernel that the padded call breaks."""
    length, missing = call.key.size(2), _missing(call.key.size(2))
    if call.inner == "torchair" and not isinstance(missing, int):
        return f"GE takes a constant for the padding, which follows the length {length} here: inner = 'npugraph_ex' can"
    query, key, value = (_padded(x.to(torch.float16)) for x in (call.query, call.key, call.value))
    padded = LaserCall(**describe(query, key, value), kv_padding=missing)
    return next((sentence for _, sentence in broken_rules(padded, LASER_RULES)), None)


def emit_laser(call: AttentionCall) -> Tensor:
    ensure_package_ops()
    query, key, value, scale, undo = _in_range(call)
    given = (_padded(x) for x in (query, key, value))
    out, _ = torch.ops.sgl_npu.laser_attention.default(*given, scale, _missing(call.key.size(2)))
    out = _first_rows(out, call.query.size(2))[..., : call.value.size(3)]
    return (out if undo is None else out * undo).to(call.query.dtype)


def _missing(length: Size) -> Size:
    """Rows to the next multiple of 256."""
    if known(length % LENGTH_MULTIPLE == 0):
        return 0
    return (LENGTH_MULTIPLE - length % LENGTH_MULTIPLE) % LENGTH_MULTIPLE


def _padded(x: Tensor) -> Tensor:
    rows, columns = _missing(x.size(2)), HEAD_DIM - x.size(3)
    return x if known(rows == 0) and known(columns == 0) else F.pad(x, (0, columns, 0, rows))


def _first_rows(x: Tensor, rows: Size) -> Tensor:
    """A symbolic number of them is read by index: torch guards on whether a slice leaves anything out."""
    return x[:, :, :rows] if isinstance(rows, int) else x.index_select(2, torch.arange(rows, device=x.device))


def _in_range(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Query, key and value in float16, the scale that is left, and what the result is multiplied with."""
    if call.query.dtype == torch.float16:
        return call.query, call.key, call.value, call.scale, None
    group = call.query.size(1) // call.key.size(1)
    query, key, value = (x.to(torch.float32) for x in (call.query, call.key, call.value))
    key_factor, value_factor = _power_of_two(key, _KEY_RANGE), _power_of_two(value, _VALUE_RANGE)
    key, query = key / key_factor, query * (_per_group(key_factor, group) * call.scale)
    longest = torch.linalg.vector_norm(key, dim=-1, keepdim=True).amax(2, keepdim=True)
    highest = torch.linalg.vector_norm(query, dim=-1, keepdim=True) * _per_group(longest, group)
    query = query * (_HIGHEST_SCORE / highest.clamp(min=_HIGHEST_SCORE))
    query, key, value = (x.to(torch.float16) for x in (query, key, value / value_factor))
    return query, key, value, 1.0, _per_group(value_factor, group)


def _power_of_two(x: Tensor, highest: float) -> Tensor:
    """(B, H, 1, 1): 1, or the power of two by which a head's values are divided to stay below `highest`."""
    largest = x.abs().amax((2, 3), keepdim=True)
    return torch.exp2(torch.ceil(torch.log2(largest.clamp(min=highest) / highest)))


def _per_group(x: Tensor, group: Size) -> Tensor:
    return x if known(group == 1) else x.repeat_interleave(group, 1)
