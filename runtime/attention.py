"""The canonical op `sgl_npu::attention`: the one node between finding attention and implementing it.

    attention(query, key, value, mask, bias, sinks, *, scale, softcap, lower, upper) -> (out, lse)

Shapes (logical, any strides; Hq % Hkv == 0, query head h reads kv head h // (Hq // Hkv)):

    query (B, Hq, Sq, D)    key (B, Hkv, Skv, D)    value (B, Hkv, Skv, Dv)    out (B, Hq, Sq, Dv)    lse (B, Hq, Sq)

With i the query index and j the key index, and `cap(x) = softcap * tanh(x / softcap)` when softcap > 0:

    score[i, j] = cap(scale * query[i] . key[j]) + bias[i, j]
    kept[i, j]  = (lower <= j - i <= upper) and mask[i, j]
    lse[i]      = log(sum over kept j of exp(score[i, j])  (+ exp(sinks[h])))
    out[i]      = sum over kept j of exp(score[i, j] - lse[i]) * value[j]

A row that keeps nothing has out = 0 and lse = -inf (lse = sinks[h] where there are sinks). `out` has the dtype of query
and the dimension order of its strides; `lse` is float32 (float64 for float64 queries) and contiguous. Accumulation is
at least float32. `upper = 0` is top-left causal, `upper = Skv - Sq` bottom-right causal, `lower` makes a window.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_npu.runtime.sizes import Condition, Size, guard

OP_NAME = "sgl_npu::attention"

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? bias=None, Tensor? sinks=None, *, "
    "float scale=1.0, float softcap=0.0, SymInt? lower=None, SymInt? upper=None"
)
_BACKWARD_ARGUMENTS = (
    "Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? mask=None, Tensor? bias=None, Tensor? sinks=None, *, float scale=1.0, float softcap=0.0, "
    "SymInt? lower=None, SymInt? upper=None, bool bias_grad=False, bool sinks_grad=False"
)

torch.library.define(OP_NAME, f"({_ARGUMENTS}) -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    f"{OP_NAME}_backward",
    f"({_BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)

attention = torch.ops.sgl_npu.attention.default
attention_backward = torch.ops.sgl_npu.attention_backward.default


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores, probabilities and lse are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_out(query: Tensor, value: Tensor) -> Tensor:
    """An uninitialised (B, Hq, Sq, Dv) in the dimension order of the query's strides."""
    if guard(query.size(-1) == value.size(-1)):
        return torch.empty_like(query)
    batch, heads, length, dim = *query.shape[:3], value.size(-1)
    if guard(query.stride(1) < query.stride(2)):
        return query.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return query.new_empty((batch, heads, length, dim))


def band_mask(rows: Size, columns: Size, lower: Size | None, upper: Size | None, device: torch.device) -> Tensor | None:
    """Bool (rows, columns), True where lower <= j - i <= upper; None where the band is open on both sides."""
    if lower is None and upper is None:
        return None
    i = torch.arange(rows, device=device).unsqueeze(1)
    distance = torch.arange(columns, device=device).unsqueeze(0) - i
    below = None if upper is None else distance <= upper
    above = None if lower is None else distance >= lower
    if below is None or above is None:
        return above if below is None else below
    return above & below


def keep_mask(query: Tensor, key: Tensor, mask: Tensor | None, lower: Size | None, upper: Size | None) -> Tensor | None:
    """The band and the mask in one bool tensor, broadcastable to (B, Hq, Sq, Skv); None keeps everything."""
    band = band_mask(query.size(2), key.size(2), lower, upper, query.device)
    if mask is None or band is None:
        return band if mask is None else mask
    return mask & band


def _grouped(x: Tensor, kv_heads: Size) -> Tensor:
    """(B, Hq, ...) as (B, Hkv, G, ...)."""
    return x.unflatten(1, (kv_heads, x.size(1) // kv_heads))


def _grouped_optional(x: Tensor | None, kv_heads: Size) -> Tensor | None:
    """A tensor broadcastable to (B, Hq, Sq, Skv) as one broadcastable to (B, Hkv, G, Sq, Skv)."""
    if x is None:
        return None
    x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    return x.unsqueeze(1) if guard(x.size(1) == 1) else _grouped(x, kv_heads)


def _scores(
    query: Tensor, key: Tensor, keep: Tensor | None, bias: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Grouped scores (B, Hkv, G, Sq, Skv) in the compute dtype, -inf where not kept, and the softcap's tanh, if any."""
    dtype = compute_dtype(query.dtype)
    kv_heads = key.size(1)
    scores = _grouped(query.to(dtype), kv_heads) @ key.to(dtype).unsqueeze(2).transpose(-1, -2) * scale
    tanh = None
    if softcap > 0.0:
        tanh = torch.tanh(scores / softcap)
        scores = tanh * softcap
    grouped_bias, grouped_keep = _grouped_optional(bias, kv_heads), _grouped_optional(keep, kv_heads)
    if grouped_bias is not None:
        scores = scores + grouped_bias.to(dtype)
    return (scores if grouped_keep is None else scores.masked_fill(~grouped_keep, -math.inf)), tanh


def _largest(scores: Tensor) -> Tensor:
    """(..., 1): the largest score of each row, -inf where it has none."""
    if guard(scores.size(-1) == 0):
        return scores.new_full((*scores.shape[:-1], 1), -math.inf)
    if not guard(scores.size(-1) > 0):  # only the call knows
        scores = F.pad(scores, (0, 1), value=-math.inf)
    return scores.amax(-1, keepdim=True)


def _exponentials(scores: Tensor, sinks: Tensor | None, kv_heads: Size) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """exp(score - top), its sum over each row (sink included), the row's top, and exp(sink - top)."""
    top = _largest(scores)
    sink = None if sinks is None else _grouped(sinks.to(scores.dtype).view(1, -1, 1, 1), kv_heads)
    top = top if sink is None else torch.maximum(top, sink)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is None:
        return weights, total, top, None
    sink = torch.exp(sink - top)
    return weights, total + sink, top, sink


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    lower: Size | None = None,
    upper: Size | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula of this module in plain differentiable torch ops, S x S scores and all. Returns (out, lse)."""
    dtype = compute_dtype(query.dtype)
    if guard(key.size(2) == 0):
        lse = query.new_full(query.shape[:3], -math.inf if sinks is None else 0.0, dtype=dtype)
        lse = lse if sinks is None else lse + sinks.to(dtype).view(1, -1, 1)
        return query.new_zeros((*query.shape[:3], value.size(-1))), lse
    kv_heads = key.size(1)
    scores, _ = _scores(query, key, keep_mask(query, key, mask, lower, upper), bias, scale, softcap)
    weights, total, top, _ = _exponentials(scores, sinks, kv_heads)
    out = (weights @ value.to(dtype).unsqueeze(2)) / total.masked_fill(total == 0.0, 1.0)
    lse = (top + torch.log(total)).squeeze(-1)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def reference_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    lower: Size | None = None,
    upper: Size | None = None,
    bias_grad: bool = False,
    sinks_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias and sinks. Those that were not asked for are empty, of one dimension.

    The probabilities are computed anew and not as exp(score - lse), which is far off where scores are huge: a row that
    a mask of -1e9 covers has an lse that float32 cannot tell from -1e9.
    Formula: dS = P * (dO V^T - rowsum(dO * O) + dlse), as in FlashAttention-2 (arXiv:2307.08691), section 3.1.
    """
    dtype = compute_dtype(query.dtype)
    none = query.new_empty((0,))
    kv_heads = key.size(1)
    scores, tanh = _scores(query, key, keep_mask(query, key, mask, lower, upper), bias, scale, softcap)
    weights, total, _, sink_weight = _exponentials(scores, sinks, kv_heads)
    total = total.masked_fill(total == 0.0, 1.0)
    weights = weights / total

    row_grad = torch.zeros_like(total) if grad_lse is None else _grouped(grad_lse.to(dtype).unsqueeze(-1), kv_heads)
    grad_value = torch.zeros_like(value)
    grad_weights: Tensor | float = 0.0
    if grad_out is not None:
        grouped_grad = _grouped(grad_out.to(dtype), kv_heads)
        grad_value = (weights.transpose(-1, -2) @ grouped_grad).sum(2).to(value.dtype)
        grad_weights = grouped_grad @ value.to(dtype).unsqueeze(2).transpose(-1, -2)
        row_grad = row_grad - (grouped_grad * _grouped(out.to(dtype), kv_heads)).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights + row_grad)

    grad_bias = none
    if bias_grad and bias is not None:
        grad_bias = grad_scores.flatten(1, 2).sum_to_size(bias.shape).to(bias.dtype)
    grad_sinks = none
    if sinks_grad and sinks is not None:
        assert sink_weight is not None
        grad_sinks = (sink_weight / total * row_grad).sum((0, 3, 4)).flatten().to(sinks.dtype)

    if tanh is not None:
        grad_scores = grad_scores * (1.0 - tanh * tanh)
    grad_scores = grad_scores * scale
    grad_query = (grad_scores @ key.to(dtype).unsqueeze(2)).flatten(1, 2).to(query.dtype)
    grad_key = (grad_scores.transpose(-1, -2) @ _grouped(query.to(dtype), kv_heads)).sum(2).to(key.dtype)
    return grad_query, grad_key, grad_value, grad_bias, grad_sinks


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> None:
    """Raise ValueError for shapes and dtypes outside the contract of the op."""
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(
            f"{OP_NAME}: query, key and value must be (B, H, S, D), "
            f"got {query.dim()}, {key.dim()} and {value.dim()} dimensions"
        )
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    rules: tuple[tuple[Condition, str], ...] = (
        (query.size(0) != key.size(0), "batch sizes differ"),
        (query.size(3) != key.size(3), "query and key head sizes differ"),
        (key.size(0) != value.size(0), "key and value batch sizes differ"),
        (key.size(1) != value.size(1), "key and value head counts differ"),
        (key.size(2) != value.size(2), "key and value lengths differ"),
    )
    for broken, rule in rules:
        if guard(broken):
            raise ValueError(f"{OP_NAME}: {rule}: {shapes}")
    if guard(key.size(1) == 0) or guard(query.size(1) % key.size(1) != 0):
        raise ValueError(f"{OP_NAME}: query heads must be a multiple of key heads: {shapes}")
    if not (query.dtype == key.dtype == value.dtype) or not query.dtype.is_floating_point:
        raise ValueError(
            f"{OP_NAME}: query, key and value must share a floating dtype, "
            f"got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"{OP_NAME}: mask must be bool (True = may attend), got {mask.dtype}; pass additive masks as bias"
        )
    if bias is not None and not bias.dtype.is_floating_point:
        raise ValueError(f"{OP_NAME}: bias must be floating, got {bias.dtype}; pass bool masks as mask")
    full = (*query.shape[:3], key.size(2))
    for name, x in (("mask", mask), ("bias", bias)):
        if x is not None and not _broadcasts(x, full):
            raise ValueError(f"{OP_NAME}: {name} {tuple(x.shape)} does not broadcast to {full}")
    if sinks is not None and (sinks.dim() != 1 or guard(sinks.size(0) != query.size(1))):
        raise ValueError(f"{OP_NAME}: sinks must be ({query.size(1)},), one per query head, got {tuple(sinks.shape)}")

    if softcap < 0.0:
        raise ValueError(f"{OP_NAME}: softcap must be 0 (none) or positive, got {softcap}")


def _broadcasts(x: Tensor, shape: tuple[Size, ...]) -> bool:
    """False where a size of `x` is known to be neither 1 nor that of `shape`."""
    pairs = zip(reversed(x.shape), reversed(shape), strict=False)
    return x.dim() <= len(shape) and not any(guard(a != 1) and guard(a != b) for a, b in pairs)


@torch.library.impl(OP_NAME, "CompositeExplicitAutograd")
def _kernel(query, key, value, mask=None, bias=None, sinks=None, **options):
    check_arguments(query, key, value, mask, bias, sinks, options.get("softcap", 0.0))
    result, lse = reference_attention(query, key, value, mask, bias, sinks, **options)
    return empty_out(query, value).copy_(result), lse.contiguous()


@torch.library.register_fake(OP_NAME)
def _fake(query, key, value, mask=None, bias=None, sinks=None, **options):
    check_arguments(query, key, value, mask, bias, sinks, options.get("softcap", 0.0))
    lse = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))
    return empty_out(query, value), lse


def _grad_likes(grad_out, grad_lse, out, lse, query, key, value, mask=None, bias=None, sinks=None, **options):
    """What each gradient has the shape, dtype and dimension order of."""
    none = query.new_empty((0,))
    wanted = bias if options.get("bias_grad") else None, sinks if options.get("sinks_grad") else None
    return query, key, value, *(none if x is None else x for x in wanted)


@torch.library.impl(f"{OP_NAME}_backward", "CompositeExplicitAutograd")
def _backward_kernel(*args, **options):
    grads = reference_attention_backward(*args, **options)
    likes = _grad_likes(*args, **options)
    return tuple(torch.empty_like(like).copy_(grad) for like, grad in zip(likes, grads, strict=True))


@torch.library.register_fake(f"{OP_NAME}_backward")
def _backward_fake(*args, **options):
    return tuple(torch.empty_like(like) for like in _grad_likes(*args, **options))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs, *output)
    bias, sinks = inputs[4:6]
    ctx.bias_grad = bias is not None and bias.requires_grad
    ctx.sinks_grad = sinks is not None and sinks.requires_grad
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    query, key, value, bias, sinks = attention_backward(
        grad_out,
        grad_lse,
        out,
        lse,
        *inputs,
        **ctx.options,
        bias_grad=ctx.bias_grad,
        sinks_grad=ctx.sinks_grad,
    )
    return query, key, value, None, bias if ctx.bias_grad else None, sinks if ctx.sinks_grad else None


torch.library.register_autograd(OP_NAME, _autograd, setup_context=_setup_context)
