"""One way to print a graph: the same text on every machine, for golden tests and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import GraphModule


def graph_text(gm: GraphModule, labels: Mapping[str, str] | None = None) -> str:
    """A line per node: name, shape if it is a tensor, op and arguments. Names follow from the ops, in graph order.

    `labels` are words to print for the strings among the arguments, such as names of process groups.
    """
    labels = labels or {}
    names: dict[fx.Node, str] = {}
    used: dict[str, int] = {}
    lines = []
    for node in gm.graph.nodes:
        stem = "input" if node.op == "placeholder" else _stem(node)
        number = used.get(stem, 0)
        used[stem] = number + 1
        names[node] = f"{stem}{number or ''}"
        if node.op == "placeholder":
            lines.append(f"{names[node]}: {_value(node)}")
        elif node.op == "output":
            lines.append(f"return {_text(node.args[0], names, labels)}")
        else:
            arguments = [_text(arg, names, labels) for arg in node.args]
            arguments += [f"{name}={_text(value, names, labels)}" for name, value in node.kwargs.items()]
            lines.append(f"{names[node]}: {_value(node)} = {_target(node)}({', '.join(arguments)})")
    return "\n".join(lines)


def _stem(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2].lstrip("_")
    return _target(node).lstrip("_")


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.replace("::", ".")
        return name if target._overloadname in ("default", "") else f"{name}.{target._overloadname}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


_SHORT = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float64": "f64",
    "int64": "i64",
    "int32": "i32",
    "bool": "b8",
}


def _value(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_SHORT.get(dtype, dtype)}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return "tuple"
    return str(value) if value is not None else "-"


def _text(value: Any, names: Mapping[fx.Node, str], labels: Mapping[str, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_text(item, names, labels) for item in value)}]"
    if isinstance(value, str):
        return labels.get(value, value)
    if isinstance(value, float):
        return f"{value:.9g}"
    return str(value).removeprefix("torch.")
