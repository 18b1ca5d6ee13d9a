"""split_qkv_rmsnorm_rope in plain GE operators, for graph engines that know no such kernel.

It stands for the kernel where the graph engine has no callback into Python.
"""

from __future__ import annotations

from typing import Any

from sgl_npu.compiler.ge_sizes import static_size


def convert_split_qkv_rmsnorm_rope(
    qkv: Any,
    sin: Any,
    cos: Any,
    q_hidden_size: int,
    kv_hidden_size: int,
    head_dim: int,
    eps: float | None = None,
    q_weight: Any = None,
    k_weight: Any = None,
    q_bias: Any = None,
    k_bias: Any = None,
    is_neox_style: bool = True,
    meta_outputs: Any = None,
) -> tuple[Any, Any, Any]:
    """The converter. Tensors are GE tensors; T may be symbolic, all other sizes are constants.

    All tokens are one sequence (1, T, N, D) to CANN's operators. Where tables and weights have the dtype of qkv, these
    compute in it, as the model does; otherwise everything is float32, as in the kernel.
    """
    rope = static_size(sin, -1, "the number of rotated channels")
    is_uniform = all(x is None or x.dtype == qkv.dtype for x in (sin, cos, q_weight, k_weight, q_bias, k_bias))
    whole = qkv if is_uniform else _float(qkv)
    query, key, value = _split(whole, [q_hidden_size, kv_hidden_size, kv_hidden_size], axis=1)
    sine, cosine = (_angles(x if is_uniform else _float(x), rope, is_neox_style) for x in (sin, cos))
    outs = []
    for part, size, weight, bias in ((query, q_hidden_size, q_weight, q_bias), (key, kv_hidden_size, k_weight, k_bias)):
        heads = _reshape(part, [1, -1, size // head_dim, head_dim])
        if eps is not None:
            given = (weight, bias) if is_uniform else (_float(weight), None if bias is None else _float(bias))
            heads = _normalised(heads, *given, eps)
        turned = _rotated(heads, sine, cosine, [size // head_dim, head_dim, rope], is_neox_style)
        outs.append(_cast(_reshape(turned, [-1, size]), qkv.dtype))
    return outs[0], outs[1], _cast(value, qkv.dtype)


def _normalised(heads: Any, weight: Any, bias: Any, eps: float) -> Any:
    from torchair.ge import attr

    inputs = {"x": heads, "gamma": weight}
    normalised, _ = _op("RmsNorm", inputs, ["y", "rstd"], epsilon=attr.Float(eps))
    return normalised if bias is None else _binary("Add", normalised, bias)


def _angles(x: Any, rope: int, is_neox_style: bool) -> Any:
    """Sine or cosine per channel, (1, T, 1, rope). Neighbours share the values of the first half."""
    if is_neox_style:
        return _reshape(x, [1, -1, 1, rope])
    half = _reshape(_split(x, [rope // 2, rope // 2], axis=-1)[0], [-1, rope // 2, 1])
    return _reshape(_concat([half, half], axis=2), [1, -1, 1, rope])


def _rotated(heads: Any, sin: Any, cos: Any, sizes: list[int], is_neox_style: bool) -> Any:
    """Heads (1, T, N, D) with their first channels rotated; `sizes` are N, D and the number of these channels."""
    count, head_dim, rope = sizes
    turned, *rest = _split(heads, [rope, head_dim - rope], axis=3) if rope < head_dim else [heads]
    if is_neox_style:
        result = _op("RotaryMul", {"x": turned, "r1": cos, "r2": sin}, ["y"])
    else:
        first, second = _split(_reshape(turned, [-1, count, rope // 2, 2]), [1, 1], axis=3)
        partner = _reshape(_concat([_op("Neg", {"x": second}, ["y"]), first], axis=3), [1, -1, count, rope])
        result = _binary("Add", _binary("Mul", turned, cos), _binary("Mul", partner, sin))
    return _concat([result, *rest], axis=3) if rest else result


def _op(operator: str, inputs: dict[str, Any], outputs: list, **attrs: Any) -> Any:
    from torchair.ge import custom_op

    return custom_op(operator, inputs=inputs, outputs=outputs, attrs=attrs)


def _binary(operator: str, x1: Any, x2: Any) -> Any:
    return _op(operator, {"x1": x1, "x2": x2}, ["y"])


def _split(x: Any, sizes: list[int], axis: int) -> list[Any]:
    from torchair.ge import Const, DataType, attr

    inputs = {"x": x, "size_splits": _ints(sizes), "split_dim": Const(axis, dtype=DataType.DT_INT32)}
    return _op("SplitV", inputs, [("y", len(sizes))], num_split=attr.Int(len(sizes)))


def _concat(parts: list[Any], axis: int) -> Any:
    from torchair.ge import attr

    return _op("ConcatD", {"x": parts}, ["y"], concat_dim=attr.Int(axis), N=attr.Int(len(parts)))


def _reshape(x: Any, shape: list[int]) -> Any:
    return _op("Reshape", {"x": x, "shape": _ints(shape)}, ["y"])


def _float(x: Any) -> Any:
    from torchair.ge import DataType

    return _cast(x, DataType.DT_FLOAT)


def _cast(x: Any, dtype: int) -> Any:
    from torchair.ge import Cast

    return x if x.dtype == dtype else Cast(x, dst_type=dtype)


def _ints(value: list[int]) -> Any:
    from torchair.ge import Const, DataType

    return Const(value, dtype=DataType.DT_INT64)
