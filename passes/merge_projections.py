"""Query, key and value come from one product, with a weight of all three that is joined outside of the graph.

before: linear(x, Wq), linear(x, Wk), linear(x, Wv) → joined by a copy → sgl_npu::split_qkv_rmsnorm_rope
after:  linear(x, W) → sgl_npu::split_qkv_rmsnorm_rope          W: Wq, Wk and Wv, an input behind the others

A weight is a module's own: what is computed in the graph would have to be joined in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.buffer_inputs import input_number
from sgl_npu.passes.fx_ops import VIEWS, aten, permuted_order, same_value
from sgl_npu.passes.inline import trace_before
from sgl_npu.passes.qkv_parts import Part
from sgl_npu.passes.site import Refusal
from sgl_npu.runtime.merged_weights import Join
from sgl_npu.runtime.sizes import known, same_sizes

_META_KEY = "sgl_npu_join"  # on the inputs that are added
_TRANSPOSITIONS = (aten.t.default, aten.transpose.int, aten.permute.default)


@dataclass(frozen=True)
class Product:
    """x @ weight + bias. `weight` is an input, (columns, channels) if `is_transposed`; `bias` is one too, or None.

    `node` is the product, `result` what has the bias too: another node if that `is_added` to the rounded product.
    """

    result: fx.Node
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    is_transposed: bool
    bias: fx.Node | None
    is_added: bool

    @property
    def columns(self) -> int:
        return self.node.meta["val"].shape[-1]

    @property
    def inputs(self) -> list[fx.Node]:
        return [x for x in (self.weight, self.bias) if x is not None]


@dataclass(frozen=True)
class Match:
    """The products that become one, in the order in which their columns stand side by side."""

    products: tuple[Product, ...]


def text(found: Match | Refusal) -> str:
    """What became of the projections, in words."""
    return f"projections not merged: {found.reason}" if isinstance(found, Refusal) else "projections merged"


def match(parts: Sequence[Part], weights: Collection[int] | Refusal) -> Match | Refusal | None:
    """None where there is one projection already. `weights`: which inputs of Dynamo's graph a module keeps, or
    why none may be merged."""
    named = dict(zip((part.columns for part in reversed(parts)), ("value", "key", "query"), strict=True))
    names = {node: named[node] for node in dict.fromkeys(part.columns for part in parts)}
    if len(names) == 1:
        return None
    if isinstance(weights, Refusal):
        return weights
    if not _are_side_by_side(parts, list(names)):
        return Refusal("heads of query, key and value would not stand side by side")
    products = []
    for node, name in names.items():
        found = _product(node)
        reason = found if isinstance(found, str) else _unfit(found, weights)
        if reason is not None:
            return Refusal(f"{name}: {reason}")
        assert isinstance(found, Product)
        products.append(found)
    reason = _disagreement(products) or _used_elsewhere(products, [part.node for part in parts])
    return Match(tuple(products)) if reason is None else Refusal(reason)


def _are_side_by_side(parts: Sequence[Part], nodes: Sequence[fx.Node]) -> bool:
    """Whether the heads of query, key and value are, once the columns of these nodes are."""
    if not all(part.is_dense and part.heads.labels is None for part in parts):
        return False
    sizes = [node.meta["val"].shape[-1] for node in nodes]
    first = {node: sum(sizes[:at]) for at, node in enumerate(nodes)}
    starts = [first[part.columns] + part.first for part in parts]
    widths = [part.heads.count * part.node.meta["val"].shape[-1] for part in parts]
    return starts == [starts[0] + sum(widths[:at]) for at in range(len(parts))]


def _product(node: fx.Node) -> Product | str:
    """A product with a weight as one of its forms has it; otherwise what it is instead."""
    result, added = node, None
    node = _behind_views(node)
    if node.target is aten.add.Tensor and not node.kwargs:
        one, other = node.args
        if not _is_tensor(one) or not _is_tensor(other):
            return "its projection is no plain product"
        one, added = (other, one) if one.meta["val"].dim() == 1 else (one, other)
        node = _behind_views(one)
    operands = _OPERANDS.get(node.target)
    if operands is None or node.kwargs or (added is not None and operands(node)[2] is not None):
        return "its projection is no plain product"
    x, weight, bias, is_transposed = operands(node)
    bias = added if bias is None else bias
    while weight.target in _TRANSPOSITIONS:
        is_transposed ^= permuted_order(weight) == [1, 0]
        weight = weight.args[0]
    columns = node.meta["val"].shape[-1]
    if weight.meta["val"].dim() != 2 or (bias is not None and not same_sizes(bias.meta["val"].shape, [columns])):
        return "its projection is no plain product"
    return Product(result, node, _behind_views(x), weight, is_transposed, bias, added is not None)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta["val"], Tensor)


def _linear(node: fx.Node) -> tuple[Any, Any, Any, bool]:
    return (*(*node.args, None)[:3], True)


# x, weight, bias, and whether the weight is (columns, channels).
_OPERANDS: dict[Any, Callable[[fx.Node], tuple[Any, Any, Any, bool]]] = {
    aten.mm.default: lambda node: (*node.args, None, False),
    aten.matmul.default: lambda node: (*node.args, None, False),
    aten.addmm.default: lambda node: (node.args[1], node.args[2], node.args[0], False),
    aten.linear.default: _linear,
}


def _behind_views(node: fx.Node) -> fx.Node:
    """The same columns, before rows were split or joined."""
    while node.target in VIEWS and known(node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]):
        node = node.args[0]
    return node


def _unfit(product: Product, weights: Collection[int]) -> str | None:
    for what, node in (("weight", product.weight), ("bias", product.bias)):
        if node is None:
            continue
        if node.op != "placeholder":
            return f"its {what} is computed in the graph"
        if input_number(node) not in weights:
            return f"its {what} is no parameter or buffer of a module"
        if any(isinstance(x.target, torch._ops.OpOverload) and x.target._schema.is_mutable for x in node.users):
            return f"its {what} is written to in the graph"
        if not all(isinstance(size, int) for size in node.meta["val"].shape):
            return f"the size of its {what} is no constant"
    return None


def _disagreement(products: Sequence[Product]) -> str | None:
    first = products[0]
    if not all(same_value(first.x, other.x) for other in products[1:]):
        return "query, key and value are projected from different tensors"
    if len({product.is_transposed for product in products}) > 1:
        return "their weights lie in different orders"
    if len({product.is_added for product in products if product.bias is not None}) > 1:
        return "their biases are added in different ways"
    tensors = [x.meta["val"] for product in products for x in product.inputs]
    if len({x.dtype for x in tensors}) > 1:
        return "their weights have different dtypes"
    return None


def _used_elsewhere(products: Sequence[Product], roots: Collection[fx.Node]) -> str | None:
    """Whether a product, or the weight of one, has a use that stays when what it is computed to is replaced."""
    nodes = {product.node for product in products}
    if any(not _ends_in(product.weight, nodes, through=_TRANSPOSITIONS) for product in products):
        return "a weight is used elsewhere too"
    if any(not _ends_in(product.node, roots) for product in products):
        return "a projection is used elsewhere too"
    return None


def _ends_in(node: fx.Node, ends: Collection[fx.Node], through: Collection[Any] | None = None) -> bool:
    """Whether all uses of a node end in others, by ops of `through` alone if that is given; a dead end is no use."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user in ends or user in seen:
                continue
            if user.is_impure() or (through is not None and user.target not in through):
                return False
            seen.add(user)
            pending.append(user)
    return True


def rewrite(
    found: Match,
    parts: Sequence[Part],
    gm: GraphModule,
    decompositions: Mapping[Any, Callable],
    seen: dict[Any, Any],
) -> tuple[Part, Part, Part]:
    """Put the one product before the first; return the parts as columns of it."""
    products = found.products
    first = min(products, key=lambda product: product.node)
    x, is_transposed = _OPERANDS[first.node.target](first.node)[0], products[0].is_transposed
    sizes = [product.columns for product in products]
    added = [_added_input(gm, [product.weight for product in products], sizes, 0 if is_transposed else 1)]
    if any(product.bias is not None for product in products):
        added.append(_added_input(gm, [product.bias for product in products], sizes, 0))
    is_added = any(product.is_added for product in products)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        right = weight.t() if is_transposed else weight
        if bias is None or is_added:
            out = rows @ right
            return (out if bias is None else out + bias,)
        return (torch.addmm(bias, rows, right),)

    (merged,) = trace_before(gm, first.node, run, [x, *added], decompositions, seen)
    assert merged is not None
    starts = {product.result: sum(sizes[:at]) for at, product in enumerate(products)}
    query, key, value = (replace(part, columns=merged, first=part.first + starts[part.columns]) for part in parts)
    return query, key, value


def _added_input(gm: GraphModule, nodes: Sequence[fx.Node | None], sizes: Sequence[int], dim: int) -> fx.Node:
    """An input behind the others that is to hold the join of some; None is for zeros."""
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    numbers = tuple(None if node is None else inputs.index(node) for node in nodes)
    join = Join(numbers, tuple(sizes), dim)
    with gm.graph.inserting_after(inputs[-1]):
        added = gm.graph.placeholder(f"merged_{len(joined_inputs(gm.graph))}")
    values = join.weights([node.meta["val"] for node in inputs])
    mode = torch._guards.detect_fake_mode(values)
    assert mode is not None
    with mode:
        added.meta.update({"val": join.tensor(values), _META_KEY: join})
    return added


def joined_inputs(graph: fx.Graph) -> list[tuple[fx.Node, Join]]:
    """The inputs that this pass has added, in their order: the last ones."""
    return [(node, node.meta[_META_KEY]) for node in graph.find_nodes(op="placeholder") if _META_KEY in node.meta]


def other_inputs(graph: fx.Graph) -> list[fx.Node]:
    """All inputs but those."""
    return [node for node in graph.find_nodes(op="placeholder") if _META_KEY not in node.meta]
