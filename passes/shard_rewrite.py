"""Turn a graph into that of one rank, as planned: local ops, slices, gathers, and a scheme at every attention.

before: x: f32[1, S, C]; mm, attention, add, … on all S rows
after:  x_local = x.index_select(1, rows of this rank); the same ops on S / P rows; outputs gathered once
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph_module import GraphModule
from torch.utils import _pytree as pytree

from sgl_npu.passes.graph_sizes import SizeNodes
from sgl_npu.passes.inline import conform, dimension_order, trace_before
from sgl_npu.passes.shard_plan import Plan, SitePlan
from sgl_npu.passes.shard_rules import Step, operands
from sgl_npu.passes.shard_spec import Sharding, same
from sgl_npu.runtime.collectives import all_gather, wait
from sgl_npu.runtime.sequence import SequenceMesh
from sgl_npu.runtime.sizes import same_sizes

Emit = Callable[["Rewriting", SitePlan], None]


class Rewriting:
    """One rewriting of one graph. `ranks` is the input that says where in the grid a rank is."""

    def __init__(
        self, gm: GraphModule, plan: Plan, mesh: SequenceMesh, ranks: fx.Node, decompositions: Mapping[Any, Callable]
    ) -> None:
        self.gm, self.plan, self.mesh, self.ranks = gm, plan, mesh, ranks
        self.decompositions = decompositions
        self.seen: dict[Any, fx.Node] = {}
        self.sizes = SizeNodes(gm.graph)
        self.slices: list[tuple[fx.Node, Sharding, fx.Node]] = []
        self.gathered: dict[fx.Node, fx.Node] = {}
        self.global_values = {node: node.meta["val"] for node in plan.shardings}
        self.original = set(gm.graph.nodes)

    def run(self, emit: Emit) -> None:
        """Rewrite every node in graph order; `emit` puts a scheme in the place of an attention."""
        for node in list(self.gm.graph.nodes):
            if node._erased:
                continue  # it read a result of an attention
            if node in self.plan.sites:
                emit(self, self.plan.sites[node])
            elif node in self.plan.steps:
                self._localise(node, self.plan.steps[node])
            elif node in self.plan.shardings:
                node.meta["val"] = node.args[0].meta["val"][node.args[1]]
            elif node.op in ("call_function", "output"):
                for source in dict.fromkeys(node.all_input_nodes):
                    if self.plan.sharding(source) is not None:
                        node.replace_input_with(source, self.whole(source, node))

    def adopt(self, old: fx.Node, new: fx.Node, sharding: Sharding) -> None:
        """Put a rank's part of a result in the place of the result."""
        old.replace_all_uses_with(new)
        self.plan.shardings[new] = [sharding]
        self.global_values[new] = old.meta["val"]

    def whole(self, node: fx.Node, anchor: fx.Node) -> fx.Node:
        """The node as every rank has it after a gather, which all its users share.

        What will be gathered anyway and is there already comes in the same message.
        """
        if self.plan.sharding(node) is None:
            return node
        if node not in self.gathered:
            dtype = node.meta["val"].dtype
            nodes = [node, *(x for x in self._awaited(anchor) if x is not node and x.meta["val"].dtype == dtype)]
            shardings = [s for x in nodes if (s := self.plan.sharding(x)) is not None]
            likes, mesh = [self.global_values[x] for x in nodes], self.mesh

            def gather(*parts: Tensor) -> tuple[Tensor, ...]:
                found = gathered(parts, shardings, mesh)
                return tuple(conform(x, like) for x, like in zip(found, likes, strict=True))

            self.gathered.update(zip(nodes, self.traced(anchor, gather, nodes), strict=True))
        return self.gathered[node]

    def _awaited(self, anchor: fx.Node) -> list[fx.Node]:
        """Sharded nodes before `anchor` that something takes whole and that are not gathered yet."""
        nodes = [node for node in self.plan.shardings if not node._erased and node not in self.gathered]
        return [node for node in nodes if self.plan.sharding(node) and node < anchor and self.is_taken_whole(node)]

    def is_taken_whole(self, node: fx.Node) -> bool:
        """Whether an op without a rule, or the caller, takes the node as all ranks have it together."""
        others = (user for user in node.users if user in self.original and user.target is not operator.getitem)
        return any(user not in self.plan.steps and user not in self.plan.sites for user in others)

    def part(self, node: fx.Node, sharding: Sharding | None, anchor: fx.Node) -> fx.Node:
        """The node as it is needed: whole, or this rank's part of it."""
        if sharding is None:
            return self.whole(node, anchor)
        if same(self.plan.sharding(node), sharding):
            return node
        node = self.whole(node, anchor)
        for source, has, found in self.slices:
            if source is node and same(has, sharding):
                return found
        like = node.meta["val"]

        def cut(x: Tensor, ranks: Tensor) -> tuple[Tensor]:
            return (in_order_of(sliced(x, sharding, ranks), like),)

        found = self.traced(anchor, cut, [node, self.ranks])[0]
        self.slices.append((node, sharding, found))
        return found

    def traced(self, anchor: fx.Node, function: Callable[..., Any], inputs: list[fx.Node]) -> list[Any]:
        return trace_before(self.gm, anchor, function, inputs, self.decompositions, self.seen)

    def _localise(self, node: fx.Node, step: Step) -> None:
        needed = iter(zip(operands(node), step.needed, strict=True))

        def local(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node) or not isinstance(leaf.meta.get("val"), Tensor):
                return leaf
            source, sharding = next(needed)
            return self.part(source, sharding, node)

        args, kwargs = pytree.tree_map(local, (node.args, node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
        node.args, node.kwargs = self._with_sizes(list(args), step), kwargs
        values = fx.map_arg((node.args, node.kwargs), lambda x: x.meta["val"])
        mode = torch._guards.detect_fake_mode(pytree.tree_leaves(node.meta["val"]))
        assert mode is not None
        with mode, torch.no_grad():
            result = node.target(*values[0], **values[1])
        _check(node, result, step)
        node.meta["val"] = result

    def _with_sizes(self, args: list[Any], step: Step) -> tuple:
        for place, size in step.sizes.items():
            position, index = place[0], place[1:]
            args += [None] * (position + 1 - len(args))
            new = self.sizes.argument(size)
            if index:
                items = list(args[position])
                items[index[0]] = new
                args[position] = items
            else:
                args[position] = new
        return tuple(args)


def _check(node: fx.Node, result: Any, step: Step) -> None:
    """The local op must give the local shape: a rule that is wrong here must not give a wrong answer."""
    befores = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    afters = result if isinstance(result, (tuple, list)) else [result]
    for before, after, sharding in zip(befores, afters, step.outputs, strict=True):
        if isinstance(before, Tensor):
            expected = list(before.shape) if sharding is None else sharding.local_shape(before.shape)
            if not same_sizes(after.shape, expected):
                raise AssertionError(f"{node.name}: {node.target} gave {list(after.shape)} on a rank, not {expected}")


def sliced(x: Tensor, sharding: Sharding, ranks: Tensor) -> Tensor:
    """A rank's part of a tensor that every rank has."""
    layout, dim = sharding.layout, sharding.dim
    if sharding.is_plain:
        return x.index_select(dim, layout.positions(ranks))
    x = x.unflatten(dim, (sharding.outer, layout.length, sharding.inner))
    return x.index_select(dim + 1, layout.positions(ranks)).flatten(dim, dim + 2)


def gathered(parts: Sequence[Tensor], shardings: Sequence[Sharding], mesh: SequenceMesh) -> list[Tensor]:
    """Sharded tensors of one dtype from the parts of all ranks, in one collective."""
    rows = []
    for x, s in zip(parts, shardings, strict=True):
        if s.is_plain:
            rows.append(x.movedim(s.dim, 0))
        else:
            rows.append(x.unflatten(s.dim, (s.outer, s.layout.local_length, s.inner)).movedim(s.dim + 1, 0))
    if len(rows) == 1:
        received = [wait(all_gather(rows[0], mesh.whole))]
    else:
        message = wait(all_gather(torch.cat([x.reshape(x.numel()) for x in rows]).unsqueeze(0), mesh.whole))
        columns = message.split([x.numel() for x in rows], 1)
        received = [
            column.reshape(mesh.size * x.size(0), *x.shape[1:]) for column, x in zip(columns, rows, strict=True)
        ]
    found = []
    for x, s in zip(received, shardings, strict=True):
        if not s.layout.is_rank_major:
            x = x.index_select(0, s.layout.gathered_index(x.device))
        found.append(x.movedim(0, s.dim) if s.is_plain else x.movedim(0, s.dim + 1).flatten(s.dim, s.dim + 2))
    return found


def in_order_of(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the order of dimensions in memory that `like` has, though other sizes: views of it were traced so."""
    order = dimension_order(like)
    if order == list(range(x.dim())):
        return x.contiguous()
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.dim())])
