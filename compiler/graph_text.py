"""One way to print a graph: the same text on every machine, for golden tests and reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import GraphModule


def graph_text(gm: GraphModule, labels: Mapping[str, str] | None = None) -> str:
    """A line per node: name, shape if it is a tensor, op and arguments. Names follow from the ops, in graph order.

    `labels` are words to print for the strings among the arguments, such as names of process groups.
    """
    return "\n".join(lines_of(gm.graph.nodes, labels))


def lines_of(nodes: Iterable[fx.Node], labels: Mapping[str, str] | None = None) -> Iterator[str]:
    """The lines of some nodes of a graph, in its order. What they read of the others has a line as inputs have."""
    labels = labels or {}
    names: dict[fx.Node, str] = {}
    used: dict[str, int] = {}

    def name(node: fx.Node, stem: str) -> str:
        number = used.get(stem, 0)
        used[stem] = number + 1
        names[node] = f"{stem}{number or ''}"
        return names[node]

    for node in nodes:
        for source in node.all_input_nodes:
            if source not in names:
                yield f"{name(source, 'input')}: {value_text(source)}"
        if node.op == "placeholder":
            if node not in names:
                yield f"{name(node, 'input')}: {value_text(node)}"
        elif node.op == "output":
            yield f"return {_text(node.args[0], names, labels)}"
        else:
            own = name(node, _stem(node))
            arguments = [_text(arg, names, labels) for arg in node.args]
            arguments += [f"{key}={_text(value, names, labels)}" for key, value in node.kwargs.items()]
            yield f"{own}: {value_text(node)} = {_target(node)}({', '.join(arguments)})"


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


def value_text(node: fx.Node) -> str:
    """The dtype and shape of a tensor, or the size that a node is."""
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
