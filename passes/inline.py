"""Replace a node by the ops that a plain torch function runs, traced on the node's own fake values."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.fx_ops import swapped_source
from sgl_npu.passes.graph_sizes import factors_of, long_products, symbol_nodes
from sgl_npu.passes.npu_forms import opened_forms
from sgl_npu.runtime.sizes import known

_CARRIED_META = ("nn_module_stack", "stack_trace", "custom", "source_fn_stack", "seq_nr", "partitioner_tag")


def trace_before(
    owner: GraphModule,
    anchor: fx.Node,
    function: Callable[..., Any],
    inputs: Sequence[fx.Node],
    decompositions: Mapping[Any, Callable],
    seen: dict[Any, Any],
    alike: Any = None,
) -> list[fx.Node | None]:
    """Insert before `anchor` what `function` computes from the values of `inputs`; return the nodes of its outputs.

    `function` takes as many tensors or SymInts as there are inputs and returns a flat tuple of tensors and None. It may
    use any size made of the graph's symbols.
    `decompositions` is the table the rest of the graph was traced with. Ops that `seen` already holds with the same
    arguments, earlier in the graph, are used again instead of inserted: masks shared by every layer are built once.
    Functions with equal `alike` do the same to inputs of equal shapes, strides and dtypes: one of them is traced.
    """
    symbols = symbol_nodes(anchor.graph)
    nodes = [*inputs, *symbols.values()]
    values = [node.meta["val"] for node in nodes]
    fake_mode = torch._guards.detect_fake_mode(values)
    assert fake_mode is not None
    key = None if alike is None else ("traced", alike, tuple(map(signature, values)))
    traced = seen.get(key)
    if traced is None:
        table = {**opened_forms(), **decompositions}
        with fake_mode, torch.no_grad(), long_products():
            # A tensor of its own for every input: make_fx takes one that is given twice for a single input.
            values = [x.detach() if isinstance(x, torch.Tensor) else x for x in values]
            traced = make_fx(lambda *given: function(*given[: len(inputs)]), table, tracing_mode="real")(*values)
        if key is not None:
            seen[key] = traced
    env: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    by_name = {str(symbol): node for symbol, node in symbols.items()}
    outputs: list[fx.Node | None] = []
    with anchor.graph.inserting_before(anchor):
        for node in traced.graph.nodes:
            if node.op == "output":
                outputs = [None if out is None else env[out] for out in node.args[0]]
            elif node.op == "get_attr":
                env[node] = anchor.graph.get_attr(_move_attribute(owner, traced, node.target))
                env[node].meta.update(node.meta)
            elif node.op == "call_function":
                env[node] = _insert(anchor, node, env, seen, by_name)
    return outputs


def signature(value: Any) -> Any:
    """What tracing sees of a value: equal for tensors of equal metadata, and for equal sizes."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return type(value), value.dtype, value.device, value.dim(), tuple(map(str, sizes))
    if isinstance(value, (tuple, list)):
        return tuple(map(signature, value))
    return type(value), str(value)


def same_strides(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Strides known to be equal wherever they matter."""
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(known(size == 1) or known(a == b) for size, a, b in pairs)


def dimension_order(x: torch.Tensor) -> list[int]:
    """The dimensions of `x`, slowest in memory first."""
    return sorted(range(x.dim()), key=lambda dim: (x.stride(dim), x.size(dim)), reverse=True)


def conform(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` in the dimension order of `like`, copied only if it is in another: what follows was traced on `like`."""
    with disable_proxy_modes_tracing():  # `like` is no part of what is being traced, nor are its symbols
        if same_strides(x, like):
            return x
        order = dimension_order(like)
    if order == list(range(like.dim())):
        return x.contiguous()
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(like.dim())])


def _insert(anchor: fx.Node, node: fx.Node, env: dict, seen: dict, symbols: dict[str, fx.Node]) -> fx.Node:
    if node.target is torch.ops.aten.sym_size.int and str(node.meta.get("val")) in symbols:
        return symbols[str(node.meta["val"])]
    args = fx.map_arg(node.args, lambda n: env[n])
    if swapped_source(node) is not None and (source := swapped_source(args[0])) is not None:
        return source
    kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
    if (factors := factors_of(node.target, args)) is not None:
        return functools.reduce(lambda one, other: _size(anchor, operator.mul, one, other, seen), factors)
    if node.target is torch.sym_sum:  # torchair 2.13 has a converter for it that fails
        terms = args[0] if isinstance(args[0], (list, tuple)) else args
        return functools.reduce(lambda one, other: _size(anchor, operator.add, one, other, seen), terms)
    key = _key(node, args, kwargs)
    if key is not None and key in seen and seen[key] < anchor:
        return seen[key]
    new = anchor.graph.call_function(node.target, args, kwargs)
    new.meta.update({name: anchor.meta[name] for name in _CARRIED_META if name in anchor.meta})
    new.meta.update({name: node.meta[name] for name in ("val", "tensor_meta", "original_aten") if name in node.meta})
    if key is not None:
        seen[key] = new
    return new


def _size(anchor: fx.Node, op: Callable, one: Any, other: Any, seen: dict) -> fx.Node:
    """A product or sum of sizes."""
    key = op, hashable(one), hashable(other)
    if key in seen and seen[key] < anchor:
        return seen[key]
    node = seen[key] = anchor.graph.call_function(op, (one, other))
    node.meta["val"] = op(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in (one, other)))
    return node


def _key(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What makes two inserted ops the same; None for ops that must not be shared."""
    is_op = isinstance(node.target, torch._ops.OpOverload)
    if is_op and (node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags):
        return None
    if not is_op and not isinstance(node.meta.get("val"), torch.SymInt):
        return None
    try:
        key = (
            node.target,
            fx.node.map_aggregate(args, hashable),
            tuple(sorted((k, hashable(v)) for k, v in kwargs.items())),
        )
        hash(key)
    except TypeError:
        return None
    return key


def hashable(value: Any) -> Any:
    """Lists as tuples, and numbers beside their type, so that 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return tuple(hashable(item) for item in value)
    return (type(value).__name__, value)


def _move_attribute(owner: GraphModule, traced: GraphModule, target: str) -> str:
    """Give `owner` an attribute of the traced module under a free name."""
    number = 0
    while hasattr(owner, f"_sgl_npu_{target}_{number}"):
        number += 1
    name = f"_sgl_npu_{target}_{number}"
    setattr(owner, name, getattr(traced, target))
    return name
