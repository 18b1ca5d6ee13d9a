"""Dynamo's graph: attention calls become canonical nodes before AOTAutograd decomposes them.

before: scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=..., enable_gqa=...)
after:  canonical_sdpa(... the same ..., site=n), a plain function that AOTAutograd traces into `sgl_npu::attention`

The function decides when it is traced, on the very tensors it gets: what it refuses runs as torch would have run it.
"""

from __future__ import annotations

import contextvars
import functools
import math
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.site import META_KEY, SiteRecord, where
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import guard


@dataclass
class Capture:
    """The sites of one Dynamo graph by id, and the setting their capture depends on."""

    platform: str
    device: str = "cpu"
    strict: bool = False
    records: dict[int, SiteRecord] = field(default_factory=dict)

    def new_record(self, node: fx.Node, spelling: str) -> SiteRecord:
        record = SiteRecord(len(self.records), spelling, *where(node))
        self.records[record.id] = record
        return record


_current: contextvars.ContextVar[Capture] = contextvars.ContextVar("sgl_npu_capture")


def capturing(capture: Capture):
    """Context in which AOTAutograd must trace a graph that `capture_attention` has rewritten."""
    return _Capturing(capture)


class _Capturing:
    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __enter__(self) -> Capture:
        self.token = _current.set(self.capture)
        return self.capture

    def __exit__(self, *_: object) -> None:
        _current.reset(self.token)


def _outcome(site: int, refusal: str | None) -> None:
    """Note how a site was traced; AOTAutograd traces more than once and the last time counts."""
    record = _current.get().records[site]
    record.refusals = [] if refusal is None else [("capture", refusal)]


# ---------------------------------------------------------------- scaled_dot_product_attention


def canonical_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    site: int,
    order: tuple[int, ...] | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention` through the canonical op; the original where a rule refuses.

    `order` is the dimension order, slowest first, of torch's own result, where somebody could tell the difference.
    """
    reason = _refuse_sdpa(query, key, value, attn_mask, dropout_p, enable_gqa)
    out = None
    if reason is None:
        try:
            out = _captured_sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa)
            out = out if order is None else _in_order(out, order)
        except TorchDynamoException:
            raise
        except Exception as error:
            if _current.get().strict:
                raise
            reason = f"capture failed: {error}"
            warnings.warn(f"sgl_npu: {reason}; torch's own attention is used", stacklevel=2)
    _outcome(site, reason)
    if out is not None:
        return out
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _captured_sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa) -> Tensor:
    """The canonical op on 4-D tensors, its result in the rank of the call."""
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if isinstance(query.size(-1), int) else query.size(-1) ** -0.5
    if not isinstance(scale, (int, float)):  # known at run time only: into the query, never read
        query, scale = query * scale, 1.0
    rank = query.dim()
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    query, key, value = (_four_dims(x, lead, enable_gqa) for x in (query, key, value))
    query, key, value = _match_heads(query, key, value)
    mask = None if attn_mask is None else _four_dims_mask(attn_mask, rank, lead, enable_gqa)
    is_bool = mask is not None and mask.dtype == torch.bool
    out, _ = attention(
        query,
        key,
        value,
        mask if is_bool else None,
        None if is_bool else mask,
        scale=float(scale),
        upper=0 if is_causal else None,
    )
    if rank > 4:
        out = out.unflatten(0, lead)
    elif rank < 4:
        out = out.flatten(0, 1) if rank == 3 else out[0, 0]
    return out


def _in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """`x` with its memory in this dimension order, copied only if it is in another."""
    x = x.permute(order)
    x = x if x.is_contiguous() else x.contiguous()
    return x.permute([order.index(dim) for dim in range(len(order))])


def _refuse_sdpa(query, key, value, attn_mask, dropout_p, enable_gqa) -> str | None:
    """The first rule under which torch keeps the call, or None."""
    tensors = [x for x in (query, key, value, attn_mask) if x is not None]
    if not isinstance(dropout_p, (int, float)) or dropout_p > 0.0:
        return f"dropout_p = {dropout_p}: the canonical op has no dropout; torch's own kernel draws it"
    if any(x.is_nested or x.layout != torch.strided for x in tensors):
        return "a nested or sparse tensor: only strided tensors are captured"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform (vmap, grad, jvp), for which the canonical op has no rule"
    if query.device.type != _current.get().device:
        return f"query is on {query.device.type}, in a graph compiled for {_current.get().device}"
    if not query.dtype.is_floating_point or torch.finfo(query.dtype).bits < 16:
        return f"query is {query.dtype}: only floating dtypes of 16 bits and more are captured"
    if query.dim() < 2 or not query.dim() == key.dim() == value.dim():
        return f"query, key and value have {query.dim()}, {key.dim()} and {value.dim()} dimensions"
    if guard(query.size(-1) == 0):
        return "D = 0: the default scale is infinite"
    if _current.get().platform == "cuda" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "training on CUDA: torch's own fused forward and backward are kept"
    heads, kv_heads = _heads(query), (_heads(key), _heads(value))
    shared = all(guard(n == heads) or guard(n == 1) or guard(heads == 1) for n in kv_heads)
    grouped = enable_gqa and guard(kv_heads[0] == kv_heads[1]) and guard(heads % kv_heads[0] == 0)
    if not (shared or grouped):
        return f"{heads} query heads over {kv_heads[0]} and {kv_heads[1]} key and value heads: no single group size"
    return None


def _heads(x: Tensor):
    return x.size(-3) if x.dim() >= 3 else 1


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Autocast as torch does for scaled_dot_product_attention: float32 and half go to the autocast dtype."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return [x if x is None or x.dtype not in eligible else x.to(dtype) for x in tensors]


def _four_dims(x: Tensor, lead: torch.Size, enable_gqa: bool) -> Tensor:
    """(lead..., H, S, D) as (B, H, S, D); without a head dimension every leading entry is a batch of one head."""
    if x.dim() == 2:
        return x[None, None]
    if x.dim() == 3:
        return x.unsqueeze(0) if enable_gqa else x.unsqueeze(1)
    x = _expand(x, (*lead, *x.shape[-3:]))
    return x if x.dim() == 4 else x.flatten(0, x.dim() - 4)


def _four_dims_mask(mask: Tensor, rank: int, lead: torch.Size, enable_gqa: bool) -> Tensor:
    """A mask for (lead..., H, Sq, Skv) as one for (B, H, Sq, Skv), both by broadcasting, as small as it can stay."""
    mask = mask[(None,) * (max(rank, 2) - mask.dim())]
    if rank == 2:
        return mask[None, None]
    if rank == 3:
        return mask.unsqueeze(0) if enable_gqa else mask.unsqueeze(1)
    if rank == 4:
        return mask
    if all(guard(size == 1) for size in mask.shape[:-3]):
        return mask.flatten(0, rank - 4)
    return mask.expand(*lead, *mask.shape[-3:]).flatten(0, rank - 4)


def _expand(x: Tensor, shape: tuple) -> Tensor:
    """`x.expand(shape)`, and `x` itself where nothing is to be expanded, so that no idle node is left in the graph."""
    return x if all(guard(old == new) for old, new in zip(x.shape, shape, strict=True)) else x.expand(shape)


def _match_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast heads (and the batch of rank-3 calls) where torch would; one key head for all queries stays one."""
    batch = torch.broadcast_shapes(*((x.size(0),) for x in (query, key, value)))[0]
    kv_heads = torch.broadcast_shapes((key.size(1),), (value.size(1),))[0]
    heads = kv_heads if guard(query.size(1) == 1) else query.size(1)
    query = _expand(query, (batch, heads, *query.shape[2:]))
    key, value = (_expand(x, (batch, kv_heads, *x.shape[2:])) for x in (key, value))
    return query, key, value


# ---------------------------------------------------------------- nn.MultiheadAttention and nn.TransformerEncoderLayer


def multi_head_attention(*args: Any, site: int, **kwargs: Any):
    """`F.multi_head_attention_forward`, its inner attention captured (need_weights=True spells it by hand).

    That is the function's own code with another `scaled_dot_product_attention` among its globals. It must not hand
    itself over to a torch function mode, as it does while AOTAutograd traces: the original would run instead.
    """
    _outcome(site, "need_weights=True: torch computes the probabilities by hand; pass need_weights=False")
    original = F.multi_head_attention_forward
    redirected = {
        **vars(F),
        "scaled_dot_product_attention": functools.partial(canonical_sdpa, site=site),
        "has_torch_function": lambda _: False,
    }
    forward = types.FunctionType(original.__code__, redirected, original.__name__, original.__defaults__)
    return forward(*args, **kwargs)


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
    *,
    site: int,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd`, the fast path of nn.TransformerEncoderLayer, in open ops.

    Masks mean what they mean there: nonzero = masked out; (S, S) for type 0, (B, S) for type 1, (B, H, S, S) for 2.
    """
    if src.is_nested:
        _outcome(site, "a nested tensor: only strided tensors are captured")
        return torch._transformer_encoder_layer_fwd(
            src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, use_gelu, norm_first, eps,
            norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2,
            mask, mask_type,
        )  # fmt: skip

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, embed_dim // num_heads))
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    keep = None
    if mask is not None:
        keep = ~mask.to(torch.bool)
        keep = keep[:, None, None] if mask_type == 1 else keep
    out = canonical_sdpa(query, key, value, keep, site=site)
    x = src + F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)
    x = x if norm_first else norm(x, norm_weight_1, norm_bias_1)
    hidden = F.linear(norm(x, norm_weight_2, norm_bias_2) if norm_first else x, ffn_weight_1, ffn_bias_1)
    hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
    x = x + F.linear(hidden, ffn_weight_2, ffn_bias_2)
    return x if norm_first else norm(x, norm_weight_2, norm_bias_2)


# ---------------------------------------------------------------- the pass

_SDPA_TARGETS = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_OPAQUE_TARGETS = {
    F.multi_head_attention_forward: ("nn.MultiheadAttention", multi_head_attention),
    torch._transformer_encoder_layer_fwd: ("nn.TransformerEncoderLayer fast path", transformer_encoder_layer),
}
_KEPT_TARGETS = {
    torch._native_multi_head_attention: "torch._native_multi_head_attention: torch's fast path is an opaque kernel",
}
# Users whose result is the same for every stride of their input, and users that hand the question on to their own user.
_STRIDE_BLIND = ("contiguous", "linear", "matmul")
_STRIDE_PASSING = ("transpose", "permute", "reshape", "flatten")
# Dimension orders, slowest first, in which torch's kernels write (B, H, S, D): their own, and that of the query.
_ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3))


def capture_attention(gm: GraphModule, capture: Capture) -> None:
    """Redirect every attention call of the graph and of its nested graphs."""
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function":
                _capture_node(node, capture)
        module.recompile()


def _capture_node(node: fx.Node, capture: Capture) -> None:
    if node.target in _SDPA_TARGETS:
        record = capture.new_record(node, "scaled_dot_product_attention")
        node.target = canonical_sdpa
        node.kwargs = {**node.kwargs, "order": _visible_order(node)}
    elif node.target in _OPAQUE_TARGETS:
        spelling, replacement = _OPAQUE_TARGETS[node.target]
        record = capture.new_record(node, spelling)
        node.target = replacement
    elif node.target in _KEPT_TARGETS:
        record = capture.new_record(node, "nn.MultiheadAttention fast path")
        record.refusals.append(("capture", _KEPT_TARGETS[node.target]))
        return
    elif node.target is torch.ops.higher_order.flex_attention:
        record = capture.new_record(node, "flex_attention")
        record.op, record.fused = "flex_attention", True
        return
    else:
        return
    node.kwargs = {**node.kwargs, "site": record.id}
    node.meta["custom"] = {**(node.meta.get("custom") or {}), META_KEY: record.id}


def _visible_order(node: fx.Node) -> tuple[int, ...] | None:
    """The dimension order of torch's own result, None where no user could tell it from another."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return None
    if value.is_contiguous():
        return None if _strides_unseen(node) else tuple(range(value.dim()))
    orders = _ORDERS if value.dim() == 4 else ()
    return next((order for order in orders if value.permute(order).is_contiguous()), None)


def _strides_unseen(node: fx.Node) -> bool:
    """Whether the result runs, used once at every step, into an op that does not care for its strides."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        name = getattr(node.target, "__name__", node.target)
        if name not in _STRIDE_PASSING:
            return name in _STRIDE_BLIND
    return False
