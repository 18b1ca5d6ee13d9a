"""Runs a converted GE graph of simple operators on the CPU, so that what a converter says can be compared."""

from __future__ import annotations

from typing import Any

import torch

# GE's number of a data type, as Cast has it in `dst_type`.
DTYPES = {0: torch.float32, 1: torch.float16, 27: torch.bfloat16}
CONSTANT_DTYPES = {"DT_INT32": torch.int32, "DT_INT64": torch.int64}


def _split(x: torch.Tensor, sizes: torch.Tensor, axis: torch.Tensor, **_: Any) -> list[torch.Tensor]:
    return list(x.split(sizes.tolist(), int(axis)))


def _rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float, **_: Any) -> list[torch.Tensor]:
    inverse = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return [x * inverse * gamma, inverse]


def _rotary_mul(x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, **_: Any) -> list[torch.Tensor]:
    """CANN's: the second half of the channels against the first."""
    first, second = x.chunk(2, -1)
    return [x * r1 + torch.cat([-second, first], -1) * r2]


KERNELS = {
    "SplitV": _split,
    "ConcatD": lambda *parts, concat_dim, **_: [torch.cat(parts, concat_dim)],
    "Reshape": lambda x, shape, **_: [x.reshape(shape.tolist())],
    "Cast": lambda x, dst_type, **_: [x.to(DTYPES[dst_type])],
    "RmsNorm": _rms_norm,
    "RotaryMul": _rotary_mul,
    "Mul": lambda x, y, **_: [x * y],
    "Add": lambda x, y, **_: [x + y],
    "Neg": lambda x, **_: [-x],
}


def run(graph: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a graph definition for the inputs that its Data nodes number."""
    values: dict[str, list[torch.Tensor]] = {}
    for op in graph.op:
        if op.type == "Data":
            values[op.name] = [inputs[op.attr["index"].i]]
        elif op.type == "Const":
            values[op.name] = [_constant(op)]
        else:
            given = [values[name][int(index)] for name, _, index in (i.rpartition(":") for i in op.input)]
            if op.type == "NetOutput":
                return given
            attributes = {name: _value(attr) for name, attr in op.attr.items() if not name.startswith("_")}
            values[op.name] = KERNELS[op.type](*given, **attributes)
    raise AssertionError("the graph has no NetOutput")


def _constant(op: Any) -> torch.Tensor:
    tensor = op.attr["value"].t
    names = tensor.desc.DESCRIPTOR.fields_by_name["dtype"].enum_type.values_by_number
    dtype = CONSTANT_DTYPES[names[tensor.desc.dtype].name]
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(list(tensor.desc.shape.dim))


def _value(attr: Any) -> Any:
    field = attr.WhichOneof("value")
    return getattr(attr, field) if field in ("i", "f", "b", "s") else None
