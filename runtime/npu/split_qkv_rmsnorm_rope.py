"""sgl_npu::split_qkv_rmsnorm_rope: the query, key and value of one projection, normalised per head and rotated.

`qkv` is (T, q_hidden_size + 2 * kv_hidden_size). Query and key heads get an RMS norm with weight and bias, if `eps` is
given, then the first sin.shape[-1] channels of each head are rotated: the second half of them against the first, or
neighbours against each other (`is_neox_style` False), which reads the first half of sin and cos only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_npu.runtime.npu.fia_call import Shape
from sgl_npu.runtime.npu.fia_rules import dtype_name, shapes_differ
from sgl_npu.runtime.npu.kernel_package import Absent, KernelUnavailable, require, resolve
from sgl_npu.runtime.npu.rule import Rule, reject
from sgl_npu.runtime.sizes import Size, guard

OP = "split_qkv_rmsnorm_rope"
SCHEMA = (
    f"{OP}(Tensor qkv, Tensor sin, Tensor cos, int q_hidden_size, int kv_hidden_size, int head_dim,"
    " float? eps=None, Tensor? q_weight=None, Tensor? k_weight=None, Tensor? q_bias=None, Tensor? k_bias=None,"
    " bool is_neox_style=True) -> (Tensor query, Tensor key, Tensor value)"
)
_KERNEL = "sgl-kernel-npu python/sgl_kernel_npu/sgl_kernel_npu/norm/split_qkv_rmsnorm_rope.py @d3736f8f"
Optional = torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitCall:
    """Arguments of split_qkv_rmsnorm_rope. `weights` and `biases` are the shapes for query and key."""

    qkv: Shape
    sin: Shape
    cos: Shape
    dtype: torch.dtype
    q_hidden_size: int
    kv_hidden_size: int
    head_dim: int
    eps: float | None = None
    weights: tuple[Shape | None, Shape | None] = (None, None)
    biases: tuple[Shape | None, Shape | None] = (None, None)

    @property
    def rope_dim(self) -> Size:
        return self.sin[-1]


def _dtype(call: SplitCall) -> str | None:
    return None if call.dtype.is_floating_point else f"qkv is {dtype_name(call.dtype)}; it must be a float type"


def _sizes(call: SplitCall) -> str | None:
    if call.head_dim < 1 or call.head_dim & (call.head_dim - 1):
        return f"head_dim = {call.head_dim} is not a power of two"
    if call.kv_hidden_size < 1 or call.kv_hidden_size % call.head_dim:
        return f"kv_hidden_size = {call.kv_hidden_size} is not a multiple of head_dim = {call.head_dim}"
    if call.q_hidden_size < 1 or call.q_hidden_size % call.kv_hidden_size:
        return f"q_hidden_size = {call.q_hidden_size} is not a multiple of kv_hidden_size = {call.kv_hidden_size}"
    return None


def _columns(call: SplitCall) -> str | None:
    expected = call.q_hidden_size + 2 * call.kv_hidden_size
    if len(call.qkv) != 2 or guard(call.qkv[1] != expected):
        return f"qkv is {tuple(call.qkv)}; it must be (T, q_hidden_size + 2 * kv_hidden_size = {expected})"
    return None


def _rope(call: SplitCall) -> str | None:
    if not call.sin or shapes_differ(call.sin, call.cos):
        return f"sin is {tuple(call.sin)} and cos is {tuple(call.cos)}; they must have one shape (T, ..., rope size)"
    if guard(call.rope_dim > call.head_dim) or guard(call.rope_dim % 2 != 0):
        return f"sin has {call.rope_dim} columns; it takes an even number up to head_dim = {call.head_dim}"
    tokens: Size = 1
    for size in call.sin[:-1]:
        tokens = tokens * size
    return f"sin has {tokens} rows, but qkv has T = {call.qkv[0]}" if guard(tokens != call.qkv[0]) else None


def _norm(call: SplitCall) -> str | None:
    if any((weight is None) != (call.eps is None) for weight in call.weights):
        return "eps, q_weight and k_weight must be given together"
    if (call.biases[0] is None) != (call.biases[1] is None):
        return "q_bias and k_bias must be given together"
    if call.biases[0] is not None and call.eps is None:
        return "biases are given without eps; they belong to the norm"
    for name, shapes in (("weight", call.weights), ("bias", call.biases)):
        for shape in shapes:
            if shape is not None and shapes_differ(shape, (call.head_dim,)):
                return f"a {name} is {tuple(shape)}; it must be (head_dim = {call.head_dim},)"
    return None


SPLIT_RULES: tuple[Rule[SplitCall], ...] = (
    Rule("dtype", _KERNEL, _dtype),
    Rule("sizes", _KERNEL, _sizes),
    Rule("columns", _KERNEL, _columns, gate=True),
    Rule("rope", _KERNEL, _rope),
    Rule("norm", _KERNEL, _norm),
)


def installed_clause(call: SplitCall, is_neox_style: bool) -> str | None:
    """Why the installed release of the kernel does not take a call: absent, or too old for it; None if it does."""
    arguments = {"sin": torch.empty(1, call.rope_dim, device="meta"), "head_dim": call.head_dim, "eps": call.eps}
    found = resolve(OP)
    if isinstance(found, Absent):
        return str(found)
    try:
        found.form.call(lambda **_: None, {**arguments, "is_neox_style": is_neox_style})
    except KernelUnavailable as error:
        return str(error)
    return None


def _shape(tensor: Optional) -> Shape | None:
    return None if tensor is None else tuple(tensor.shape)


def _check(
    qkv: torch.Tensor,
    sin: torch.Tensor,
    cos: torch.Tensor,
    weights: tuple[Optional, Optional],
    biases: tuple[Optional, Optional],
    **settings: object,
) -> None:
    call = SplitCall(
        qkv=tuple(qkv.shape),
        sin=tuple(sin.shape),
        cos=tuple(cos.shape),
        dtype=qkv.dtype,
        weights=(_shape(weights[0]), _shape(weights[1])),
        biases=(_shape(biases[0]), _shape(biases[1])),
        **settings,  # type: ignore[arg-type]
    )
    reject(OP, call, SPLIT_RULES)


def _normalised(heads: torch.Tensor, eps: float | None, weight: Optional, bias: Optional) -> torch.Tensor:
    if eps is None or weight is None:
        return heads
    heads = heads * (heads.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    return heads if bias is None else heads + bias.float()


def _rotated(heads: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """Heads (T, N, D) with their first sin.shape[-1] channels rotated; sin and cos are (T, rope size)."""
    size = sin.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    if is_neox_style:
        first, second = turned.chunk(2, -1)
        partner = torch.cat([-second, first], -1)
    else:
        partner = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
        sin, cos = (x[:, : size // 2].repeat_interleave(2, -1) for x in (sin, cos))
    return torch.cat([turned * cos[:, None] + partner * sin[:, None], rest], -1)


@torch.no_grad()
def split_qkv_rmsnorm_rope(
    qkv: torch.Tensor,
    sin: torch.Tensor,
    cos: torch.Tensor,
    q_hidden_size: int,
    kv_hidden_size: int,
    head_dim: int,
    eps: float | None = None,
    q_weight: Optional = None,
    k_weight: Optional = None,
    q_bias: Optional = None,
    k_bias: Optional = None,
    is_neox_style: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CPU kernel: computes in float32, returns (T, q_hidden_size) and twice (T, kv_hidden_size) in qkv's dtype."""
    _check(qkv, sin, cos, (q_weight, k_weight), (q_bias, k_bias), q_hidden_size=q_hidden_size,
           kv_hidden_size=kv_hidden_size, head_dim=head_dim, eps=eps)  # fmt: skip
    query, key, value = qkv.split([q_hidden_size, kv_hidden_size, kv_hidden_size], 1)
    sin, cos = (x.float().reshape(qkv.shape[0], -1) for x in (sin, cos))
    outs = []
    for part, weight, bias in ((query, q_weight, q_bias), (key, k_weight, k_bias)):
        heads = _normalised(part.float().unflatten(1, (-1, head_dim)), eps, weight, bias)
        outs.append(_rotated(heads, sin, cos, is_neox_style).flatten(1).to(qkv.dtype))
    return outs[0], outs[1], value.clone(memory_format=torch.contiguous_format)


def split_qkv_rmsnorm_rope_fake(
    qkv: torch.Tensor,
    sin: torch.Tensor,
    cos: torch.Tensor,
    q_hidden_size: int,
    kv_hidden_size: int,
    *_: object,
    **__: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and dtypes, sizes possibly symbolic."""
    sizes = (q_hidden_size, kv_hidden_size, kv_hidden_size)
    query, key, value = (qkv.new_empty((qkv.shape[0], size)) for size in sizes)
    return query, key, value


def split_qkv_rmsnorm_rope_npu(
    qkv: torch.Tensor,
    sin: torch.Tensor,
    cos: torch.Tensor,
    q_hidden_size: int,
    kv_hidden_size: int,
    head_dim: int,
    eps: float | None = None,
    q_weight: Optional = None,
    k_weight: Optional = None,
    q_bias: Optional = None,
    k_bias: Optional = None,
    is_neox_style: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NPU kernel: sgl-kernel-npu's, which reads every tensor as contiguous.

    Where that is not installed it is the formula, op by op: nobody gets here then but a GE graph that is run eagerly.
    """
    if isinstance(resolve(OP), Absent):
        return split_qkv_rmsnorm_rope(
            qkv, sin, cos, q_hidden_size, kv_hidden_size, head_dim, eps, q_weight, k_weight, q_bias, k_bias,
            is_neox_style,
        )  # fmt: skip
    _check(qkv, sin, cos, (q_weight, k_weight), (q_bias, k_bias), q_hidden_size=q_hidden_size,
           kv_hidden_size=kv_hidden_size, head_dim=head_dim, eps=eps)  # fmt: skip
    optional = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    query, key, value = require(OP)(
        input=qkv.contiguous(),
        sin=sin.contiguous(),
        cos=cos.contiguous(),
        q_hidden_size=q_hidden_size,
        kv_hidden_size=kv_hidden_size,
        head_dim=head_dim,
        eps=eps,
        **{name: None if x is None else x.contiguous() for name, x in optional.items()},
        is_neox_style=is_neox_style,
    )
    return query, key, value
