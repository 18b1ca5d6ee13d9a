"""How GE, torchair's graph engine, sees our operators around sgl-kernel-npu, and one of torch_npu.

Three kernels of the wheel `attentions` and two of CANN have an operator in GE (its IR), which the converters here
emit. Where torchair can call back into Python instead (a CANN with `ge.custom_op`), operators without an IR are left
to it: it then runs their NPU kernel. Elsewhere split_qkv_rmsnorm_rope becomes plain GE operators. torchair 2.13 has no
converter for npu_block_sparse_attention; one that has keeps its own.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgl_npu.compiler.ge_sizes import static_size
from sgl_npu.compiler.ge_split_rope import convert_split_qkv_rmsnorm_rope
from sgl_npu.runtime.npu import ensure_ops
from sgl_npu.runtime.npu.fia_call import INT_MAX
from sgl_npu.runtime.npu.kernel_package import BUILD
from sgl_npu.runtime.npu.package_ops import NAMESPACE, ensure_package_ops
from sgl_npu.runtime.npu.sparse_blocks import SPARSE_SIZE

_DEFAULT_WINDOW = 214748647  # as it is written in the operator's definition
_PAD = "pad the sequences to a multiple of 256 before the compiled function"
_OPS = "sgl-kernel-npu csrc/attentions/csrc/ops"


@dataclass(frozen=True)
class GeOperator:
    """How an operator converts.

    `ir` is the GE operator, None where there is none; `package` is the wheel that brings it, None for CANN itself.
    """

    convert: Callable
    ir: str | None = None
    package: str | None = None
    source: str = ""
    namespace: str = NAMESPACE


def _emit(operator: str, inputs: dict[str, Any], outputs: list[str], attrs: dict[str, Any]) -> Any:
    from torchair.ge import custom_op

    row = next(row for row in CONVERTERS.values() if row.ir == operator)
    try:
        return custom_op(operator, inputs=inputs, outputs=outputs, attrs=attrs)
    except RuntimeError as error:
        if row.package is None:
            remedy = "install a CANN with ops-transformer"
        else:
            remedy = f"{BUILD} with ./build.sh -a {row.package} (wheel {row.package}, up to 2026-08-21)"
        raise RuntimeError(
            f"GE: no operator {operator}; {remedy}, or compile with inner='npugraph_ex', which needs none: {error}"
        ) from error


def _lengths(lengths: Any) -> Any:
    """Lengths as an int64 tensor; torchair has already packed a list with symbols into one."""
    from torchair import ge

    return ge.Const(list(lengths), dtype=ge.DataType.DT_INT64) if isinstance(lengths, (list, tuple)) else lengths


def _convert_laser_attention(
    query: Any, key: Any, value: Any, scale: float, kv_padding: Any = 0, meta_outputs: Any = None
) -> tuple[Any, Any]:
    from torchair.ge import attr

    # An attribute of a GE operator is fixed when the graph is compiled.
    if not isinstance(kv_padding, int):
        raise RuntimeError(f"GE: kv_padding of {NAMESPACE}::laser_attention is symbolic; it must be a constant: {_PAD}")
    lse, out = _emit(
        "LaserAttention",
        {"query": query, "key": key, "value": value, "atten_mask": None, "alibi_mask": None, "drop_mask": None},
        ["softmax_log_max_sum", "attention_out"],
        {
            "scale_value": attr.Float(scale),
            "head_num": attr.Int(_heads(query)),
            "input_layout": attr.Str("BNSD"),
            "keep_prob": attr.Float(1.0),
            "pre_tokens": attr.Int(kv_padding or INT_MAX),
            "next_tokens": attr.Int(1),
            "is_highPrecision": attr.Bool(True),
        },
    )
    return out, lse


def _convert_block_sparse_attention(
    query: Any,
    key: Any,
    value: Any,
    sparse_mask: Any,
    sparse_count: Any,
    scale: float,
    causal: bool,
    sparse_size: int = SPARSE_SIZE,
    meta_outputs: Any = None,
) -> Any:
    from torchair.ge import attr

    unused = ("pse_shift", "atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv", "deq_scale1", "quant_scale1",
              "deq_scale2", "quant_scale2", "quant_offset2")  # fmt: skip
    return _emit(
        "AdaBlockSparseAttention",
        {
            **{"query": query, "key": key, "value": value},
            **dict.fromkeys(unused),
            **{"sparse_mask": sparse_mask, "sparse_count_table": sparse_count},
        },
        ["attention_out"],
        {
            "num_heads": attr.Int(_heads(query)),
            "scale_value": attr.Float(scale),
            "pre_tokens": attr.Int(_DEFAULT_WINDOW),
            "next_tokens": attr.Int(0),
            "input_layout": attr.Str("BNSD"),
            "num_key_value_heads": attr.Int(_heads(key)),
            "sparse_mode": attr.Int(0),
            "inner_precise": attr.Int(1),
            "sparse_size": attr.Int(sparse_size),
            "causal": attr.Bool(causal),
        },
    )


def _convert_sparse_block_estimate(
    query: Any,
    key: Any,
    scale: float,
    causal: bool,
    threshold: float = 1.0,
    row_sparse: float = 1.0,
    keep_sink: bool = True,
    keep_recent: bool = True,
    stride: int = 8,
    sparse_size: int = SPARSE_SIZE,
    meta_outputs: Any = None,
) -> tuple[Any, Any]:
    """The operator's own shape inference sets nothing, so GE knows the results' shapes from torchair alone."""
    from torchair.ge import attr

    return _emit(
        "SparseBlockEstimate",
        {"query": query, "key": key, "actual_seq_lengths": None, "actual_seq_lengths_kv": None},
        ["sparse_mask", "sparse_count_table"],
        {
            "input_layout": attr.Str("BNSD"),
            "stride": attr.Int(stride),
            "sparse_size": attr.Int(sparse_size),
            "num_heads": attr.Int(_heads(query)),
            "num_key_value_heads": attr.Int(_heads(key)),
            "scale_value": attr.Float(scale / stride),
            "threshold": attr.Float(threshold),
            "causal": attr.Bool(causal),
            "keep_sink": attr.Bool(keep_sink),
            "keep_recent": attr.Bool(keep_recent),
            "row_sparse": attr.Float(row_sparse),
        },
    )


def _convert_rain_fusion_attention(
    query: Any,
    key: Any,
    value: Any,
    select_idx: Any,
    select_num_idx: Any,
    actual_seq_qlen: Any,
    actual_seq_kvlen: Any,
    scale: float,
    block_shape: Sequence[int],
    input_layout: str = "TND",
    inner_precise: int = 0,
    meta_outputs: Any = None,
) -> Any:
    from torchair.ge import attr

    out, _ = _emit(
        "RainFusionAttention",
        {
            "query": query,
            "key": key,
            "value": value,
            "selectIdx": select_idx,
            "selectNumIdx": select_num_idx,
            "blockShape": _lengths(block_shape),
            "attenMask": None,
            "actualSeqLengths": _lengths(actual_seq_qlen),
            "actualSeqLengthsKv": _lengths(actual_seq_kvlen),
            "blockTable": None,
        },
        ["attentionOut", "softmaxLse"],
        {
            "qInputLayout": attr.Str(input_layout),
            "kvInputLayout": attr.Str(input_layout),
            "numKeyValueHeads": attr.Int(_heads(key, input_layout)),
            "maskType": attr.Int(0),
            "scaleValue": attr.Float(scale),
            "innerPrecise": attr.Int(inner_precise),
            "blockSize": attr.Int(0),
        },
    )
    return out


def _convert_npu_block_sparse_attention(
    query: Any,
    key: Any,
    value: Any,
    block_sparse_mask: Any,
    block_shape: Sequence[int],
    *,
    q_input_layout: str = "TND",
    kv_input_layout: str = "TND",
    num_key_value_heads: int = 1,
    scale_value: float = 0.0,
    inner_precise: int = 1,
    actual_seq_lengths: Any = None,
    actual_seq_lengths_kv: Any = None,
    softmax_lse_flag: int | None = 0,
    meta_outputs: Any = None,
) -> tuple[Any, Any]:
    from torchair.ge import attr

    if softmax_lse_flag:
        raise RuntimeError(
            "GE: softmax_lse_flag of npu::npu_block_sparse_attention is set; GE's operator infers another shape for "
            "the lse than torch_npu: leave it at 0, or compile with inner='npugraph_ex'"
        )
    return _emit(
        "BlockSparseAttention",
        {
            "query": query,
            "key": key,
            "value": value,
            "blockSparseMask": block_sparse_mask,
            "attenMask": None,
            "blockShape": _lengths(block_shape),
            "actualSeqLengths": None if actual_seq_lengths is None else _lengths(actual_seq_lengths),
            "actualSeqLengthsKv": None if actual_seq_lengths_kv is None else _lengths(actual_seq_lengths_kv),
            "blockTable": None,
        },
        ["attentionOut", "softmaxLse"],
        {
            "qInputLayout": attr.Str(q_input_layout),
            "kvInputLayout": attr.Str(kv_input_layout),
            "numKeyValueHeads": attr.Int(num_key_value_heads),
            "maskType": attr.Int(0),
            "scaleValue": attr.Float(scale_value),
            "innerPrecise": attr.Int(inner_precise),
            "blockSize": attr.Int(0),
            "preTokens": attr.Int(INT_MAX),
            "nextTokens": attr.Int(INT_MAX),
            "softmaxLseFlag": attr.Int(0),
        },
    )


def _heads(tensor: Any, layout: str = "BNSD") -> int:
    return static_size(tensor, layout.index("N"), "the number of heads")


CONVERTERS: dict[str, GeOperator] = {
    "laser_attention": GeOperator(
        _convert_laser_attention,
        "LaserAttention",
        "attentions",
        f"{_OPS}/laser_attention/op_host/laser_attention_def.cpp @3f03db0c",
    ),
    "block_sparse_attention": GeOperator(
        _convert_block_sparse_attention,
        "AdaBlockSparseAttention",
        "attentions",
        f"{_OPS}/ada_block_sparse_attention/op_host/ada_block_sparse_attention_def.cpp @3f03db0c",
    ),
    "sparse_block_estimate": GeOperator(
        _convert_sparse_block_estimate,
        "SparseBlockEstimate",
        "attentions",
        f"{_OPS}/sparse_block_estimate/op_host/sparse_block_estimate_def.cpp @3f03db0c",
    ),
    "rain_fusion_attention": GeOperator(
        _convert_rain_fusion_attention,
        "RainFusionAttention",
        None,
        "CANN ops-transformer attention/rain_fusion_attention/op_host/rain_fusion_attention_def.cpp (2025-12)",
    ),
    # The wheel `attentions` of 2026-05-06 to 2026-08-11 has another operator of this name.
    "npu_block_sparse_attention": GeOperator(
        _convert_npu_block_sparse_attention,
        "BlockSparseAttention",
        None,
        "CANN ops-transformer attention/block_sparse_attention/op_host/block_sparse_attention_def.cpp (2026)",
        "npu",
    ),
    # A Triton kernel, which GE has no operator for.
    "split_qkv_rmsnorm_rope": GeOperator(convert_split_qkv_rmsnorm_rope),
}

_lock = threading.Lock()
_registered = False


def register() -> None:
    """Tell torchair how the operators convert. Safe to call again and from several threads; needs torch_npu."""
    global _registered
    with _lock:
        if _registered:
            return
        from torchair import register_fx_node_ge_converter

        ensure_ops()
        ensure_package_ops()
        for name, row in CONVERTERS.items():
            packet = getattr(getattr(torch.ops, row.namespace), name, None)  # None: an older torch_npu
            if packet is not None and not _has_converter(packet.default) and not _left_to_callback(row):
                register_fx_node_ge_converter(packet.default)(row.convert)
        _registered = True


def _has_converter(op: torch._ops.OpOverload) -> bool:
    """Whether torchair has its own. The attribute is private; seen in torch_npu 2.13.0."""
    return hasattr(op, "_ge_converter")


def _left_to_callback(row: GeOperator) -> bool:
    """Whether torchair's callback into Python is there and the operator has no IR on this machine."""
    has_ir = row.ir is not None and (row.package is None or _is_installed(row.package))
    return not has_ir and _is_installed("ge.custom_op")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
