"""Where the sequence is sharded: decided for every node of a graph before anything is changed.

    ahead      An attention over the sequence takes slices of query, key and value, and gives a part of its result.
               What follows is sharded as long as every op has a rule; an op without one gets its inputs gathered.
    back       What is only ever sliced is computed in slices: from the first attention back to the inputs, an op
               whose users all want the same part of it computes that part, as far as it can.

A slice of what every rank has is free, so nothing that goes back adds communication, and the sequence is sharded at the
earliest point that costs none.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from sgl_npu.passes.shard_rules import Step, backward, forward, operands
from sgl_npu.passes.shard_spec import Layouts, Sharding, same
from sgl_npu.passes.site import AttentionSite
from sgl_npu.runtime.sequence import SequenceLayout
from sgl_npu.runtime.sizes import Size, known


@dataclass(frozen=True)
class SitePlan:
    """An attention with sharded queries. `key_layout` is None where every rank has all keys and values."""

    site: AttentionSite
    query_layout: SequenceLayout
    key_layout: SequenceLayout | None

    def needed(self, name: str) -> Sharding | None:
        layout = self.query_layout if name == "query" else self.key_layout if name in ("key", "value") else None
        return None if layout is None else Sharding(2, layout)


@dataclass(frozen=True)
class Gather:
    """A tensor that is gathered for an op without a rule."""

    source: fx.Node
    user: fx.Node


@dataclass
class Plan:
    """`shardings` of each result of a node that is sharded at all; `steps` of the nodes that run on parts."""

    layouts: Layouts
    shardings: dict[fx.Node, list[Sharding | None]] = field(default_factory=dict)
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    sites: dict[fx.Node, SitePlan] = field(default_factory=dict)
    gathers: list[Gather] = field(default_factory=list)

    def sharding(self, node: fx.Node | None) -> Sharding | None:
        """The sharding of a tensor; a node of several results has none of its own."""
        found = None if node is None else self.shardings.get(node)
        return None if found is None or node is None or not isinstance(node.meta["val"], Tensor) else found[0]


def make_plan(
    graph: fx.Graph, sites: Sequence[AttentionSite], main: Container[fx.Node], layouts: Layouts, whole: bool = True
) -> Plan:
    """The plan of a graph; `main` are the nodes of those sites that are worth spreading over the ranks.

    Without `whole`, attention alone is spread: its result is gathered, and all else is computed by every rank.
    """
    plan = Plan(layouts)
    by_node = {site.node: site for site in sites}
    for node in graph.nodes:
        if node in by_node:
            _plan_site(by_node[node], node in main, plan)
        elif node.target is operator.getitem and (whole or node.args[0] in plan.sites):
            _plan_getitem(node, plan)
        elif whole and node.op == "call_function":
            _plan_ahead(node, plan)
    if whole:
        for node in reversed(graph.nodes):
            if node.op == "call_function" and node not in plan.shardings:
                _plan_back(node, plan)
    for node, found in plan.sites.items():
        if all(plan.sharding(found.site.argument(name)) is None for name in ("key", "value")):
            plan.sites[node] = replace(found, key_layout=None)  # every rank computes them all, for another user
    return plan


def _plan_site(site: AttentionSite, is_main: bool, plan: Plan) -> None:
    query, key, value = (plan.sharding(site.argument(name)) for name in ("query", "key", "value"))
    query_length, key_length = (_length(site, name) for name in ("query", "key"))
    layout = query.layout if query is not None else plan.layouts.of_length(query_length) if is_main else None
    if layout is None or not (query is None or same(query, Sharding(2, layout))):
        for name in _ARGUMENTS:
            if plan.sharding(site.argument(name)) is not None:
                plan.gathers.append(Gather(site.argument(name), site.node))
        return
    key_layout = None
    if known(query_length == key_length):
        key_layout = layout
    elif key is not None and same(key, Sharding(2, key.layout)):
        key_layout = key.layout
    if any(x is not None and (key_layout is None or not same(x, Sharding(2, key_layout))) for x in (key, value)):
        key_layout = None
        for name in ("key", "value"):
            if plan.sharding(site.argument(name)) is not None:
                plan.gathers.append(Gather(site.argument(name), site.node))
    plan.sites[site.node] = SitePlan(site, layout, key_layout)
    plan.shardings[site.node] = [Sharding(2, layout), Sharding(2, layout)]


def _length(site: AttentionSite, name: str) -> Size:
    tensor = site.tensor(name)
    assert tensor is not None
    return tensor.size(2)


def _plan_getitem(node: fx.Node, plan: Plan) -> None:
    source, index = node.args
    found = plan.shardings.get(source)
    if found is not None and found[index] is not None:
        plan.shardings[node] = [found[index]]


def _plan_ahead(node: fx.Node, plan: Plan) -> None:
    sources = operands(node)
    given = [plan.sharding(source) for source in sources]
    if all(x is None for x in given):
        return
    step = forward(node, given, plan.layouts)
    if step is None:
        plan.gathers += [Gather(source, node) for source, x in zip(sources, given, strict=True) if x is not None]
    else:
        plan.steps[node] = step
        plan.shardings[node] = step.outputs


def _plan_back(node: fx.Node, plan: Plan) -> None:
    if isinstance(node.meta.get("val"), Tensor):
        wanted = _wanted(node, plan)
        if wanted is None:
            return
        if node.target is operator.getitem:
            plan.shardings[node] = [wanted]  # taken back below unless the node it reads can give it
            return
        step = backward(node, [wanted], plan.layouts)
    else:
        readers = [user for user in node.users if user.users]
        if not readers or any(reader.target is not operator.getitem for reader in readers):
            return
        results: list[Sharding | None] = [None] * len(node.meta["val"])
        for reader in readers:
            results[reader.args[1]] = plan.sharding(reader)
        complete = all(plan.sharding(reader) is not None for reader in readers)
        step = backward(node, results, plan.layouts) if complete else None
        if step is None:
            for reader in readers:
                plan.shardings.pop(reader, None)
    if step is not None:
        plan.steps[node] = step
        plan.shardings[node] = step.outputs


def _wanted(node: fx.Node, plan: Plan) -> Sharding | None:
    """The part of a node that all its users want; None if one wants it whole, or two want different parts."""
    found: list[Sharding | None] = []
    for user in node.users:
        if user in plan.sites:
            site = plan.sites[user].site
            found += [plan.sites[user].needed(name) for name in _ARGUMENTS if site.argument(name) is node]
        elif user in plan.steps:
            pairs = zip(operands(user), plan.steps[user].needed, strict=True)
            found += [needed for operand, needed in pairs if operand is node]
        else:
            found.append(None)
    agreed = bool(found) and all(x is not None and same(x, found[0]) for x in found)
    return found[0] if agreed else None


_ARGUMENTS = ("query", "key", "value", "mask", "bias", "sinks")
