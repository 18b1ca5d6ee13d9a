"""Sequence parallelism: shard the sequence through the whole graph and put a scheme at every attention.

before: every rank computes all rows of every activation
after:  every rank computes its rows; ring, Ulysses or KV-gather at the attentions; outputs gathered once

Slices, positions and schemes read the rank from an input of the graph, so every rank has the same graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph_module import GraphModule

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sequence import Chosen, choose_scheme, gather_kv, refusals
from sgl_npu.lowering.sequence.schedule import Schedule
from sgl_npu.passes.graph_sizes import share_sizes
from sgl_npu.passes.inline import conform, trace_before
from sgl_npu.passes.parallel_inputs import gathered_columns, global_positions, refuse_site, sources, whole_layout
from sgl_npu.passes.shard_plan import Plan, SitePlan, make_plan
from sgl_npu.passes.shard_rewrite import Emit, Rewriting, in_order_of
from sgl_npu.passes.shard_segments import joined_segments
from sgl_npu.passes.shard_spec import Layouts, Sharding
from sgl_npu.passes.site import AttentionSite, SiteRecord, find_sites, mask_text, place, shape_text
from sgl_npu.runtime.sequence import SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import hint, known

SMALL_SITE = 16  # an attention with less than this share of the largest one's work is not worth communication


class SchemeError(ValueError):
    """The user's degrees cannot serve an attention of the model."""


@dataclass(frozen=True)
class ParallelSetting:
    """The ranks that share a sequence, where this one is among them, and what the user asked for.

    `schemes` are those that may be used over the ranks, in the order of preference where they cost the same.
    `platform` and `inner` are those of `AttentionCall`. `note` is told the steps of every attention, if anybody asks.
    """

    mesh: SequenceMesh
    rank: tuple[int, int]
    schemes: tuple[str, ...]
    shard: str = "auto"
    placement: str = "auto"
    max_gather: float = 8.0
    platform: str = "cpu"
    inner: str = "inductor"
    note: Callable[[SiteRecord, Schedule], None] | None = None


@dataclass
class ParallelReport:
    """What was sharded: the grid, the gathers of ops without a rule (op and line, shape, bytes), or why nothing was.

    Gathers of outputs are not among them.
    """

    grid: str
    gathers: list[tuple[str, str, str]] = field(default_factory=list)
    refused: str = ""


def parallelise(
    gm: GraphModule,
    setting: ParallelSetting,
    records: dict[int, SiteRecord],
    decompositions: Mapping[Any, Callable],
) -> ParallelReport:
    """Rewrite the graph for one rank. It gets one more input, int64 (2,): the rank's place in the grid."""
    mesh = setting.mesh
    report = ParallelReport(f"{mesh.blocks.size} x {mesh.ulysses.size}")
    share_sizes(gm.graph)
    sites = find_sites(gm.graph, records)
    main = _main_sites(sites)
    if not main:
        report.refused = "no attention has more than one query row, and a batch" if sites else "there is no attention"
        return report
    layouts = _layouts(gm.graph, main, setting)
    if setting.shard == "inputs":
        plan = make_plan(gm.graph, sites, {site.node for site in main}, layouts)
        _share_inputs(gm, plan, setting, decompositions)
        return report
    plan = make_plan(gm.graph, sites, {site.node for site in main}, layouts, setting.shard != "none")
    report.gathers = [_gather_row(gather.source, gather.user) for gather in plan.gathers]
    report.refused = _over_budget(plan, setting)
    if report.refused:
        return report
    for site in plan.sites.values():
        _describe(site.site)
    ranks = _ranks_input(gm)
    Rewriting(gm, plan, mesh, ranks, decompositions).run(_emitter(setting))
    gm.graph.eliminate_dead_code()
    return report


def _main_sites(sites: list[AttentionSite]) -> list[AttentionSite]:
    """The attentions that are worth spreading over the ranks: the largest ones."""
    work = {site.node: _work(site) for site in sites}
    most = max(work.values(), default=0)
    return [site for site in sites if work[site.node] and work[site.node] * SMALL_SITE >= most]


def _work(site: AttentionSite) -> int:
    """Multiplications of one attention for the sizes at hand; 0 for a single query row, as at decode."""
    query, key = site.tensor("query"), site.tensor("key")
    assert query is not None and key is not None
    if any(known(size == 0) for size in (*query.shape, *key.shape)) or known(query.size(2) == 1):
        return 0
    batch, heads, length, dim = (hint(size) for size in query.shape)
    return batch * heads * length * dim * hint(key.size(2))


def _layouts(graph: fx.Graph, sites: list[AttentionSite], setting: ParallelSetting) -> Layouts:
    """The layout of every sequence of queries.

    Causal ones lie in zigzag where blocks of ranks share the triangle, unless ulysses, which needs them in order, may
    serve them and sends less.
    """
    layouts = Layouts(setting.mesh)
    for site in sites:
        query = site.tensor("query")
        assert query is not None
        length = query.size(2)
        if layouts.of_length(length) is not None:
            continue
        segments = joined_segments(graph, length, site.node)
        if segments is not None:
            for segment in segments:
                layouts.add([segment])
            layouts.add(segments)
            continue
        zigzag = setting.mesh.blocks.size > 1 and _is_triangle(site) and setting.placement != "contiguous"
        layouts.add([length], zigzag and not _is_cheaper_in_order(site, setting))
    return layouts


def _is_cheaper_in_order(site: AttentionSite, setting: ParallelSetting) -> bool:
    """Whether ulysses would be chosen for a causal attention if its rows were not in zigzag."""
    if setting.placement != "auto" or setting.shard != "auto" or "ulysses" not in setting.schemes:
        return False
    nodes, mesh = _tensors(site), setting.mesh
    call = _call(nodes, [node.meta["val"] for node in nodes.values()], _options(site, setting))
    length = call.query.size(2)
    keys_stay = all(list(nodes[name].users) == [site.node] for name in ("key", "value"))  # nobody gathers them
    if not keys_stay or not known(call.key.size(2) == length):
        return False
    ordered, zigzag = (SequenceLayout((length,), mesh.blocks.size, mesh.ulysses.size, x) for x in (False, True))
    found, other = (choose_scheme(call, x, x, mesh, setting.schemes) for x in (ordered, zigzag))
    if found is None or found.name != "ulysses":
        return False
    return other is None or hint(found.sent) < hint(other.sent)


def _is_triangle(site: AttentionSite) -> bool:
    return site.lower is None and site.upper is not None


def _ranks_input(gm: GraphModule) -> fx.Node:
    """A new input behind the others."""
    inputs = gm.graph.find_nodes(op="placeholder")
    values = [node.meta["val"] for node in inputs]
    mode = torch._guards.detect_fake_mode(values)
    assert mode is not None
    device = next(x.device for x in values if isinstance(x, Tensor))
    with gm.graph.inserting_after(list(inputs)[-1]):
        node = gm.graph.placeholder("sequence_rank")
    with mode:
        node.meta["val"] = torch.empty(2, dtype=torch.int64, device=device)
    return node


def _over_budget(plan: Plan, setting: ParallelSetting) -> str:
    """Why sharding costs more than it is worth: too much would be gathered for ops without a rule."""
    gathered = sum(_bytes(source) for source in dict.fromkeys(gather.source for gather in plan.gathers))
    tensors = [plan.sites[node].site.argument(name) for node in plan.sites for name in ("query", "key", "value")]
    budget = setting.max_gather * sum(_bytes(x) for x in tensors if x is not None)
    if gathered <= budget:
        return ""
    ops = ", ".join(dict.fromkeys(place(gather.user) for gather in plan.gathers))
    return (
        f"{gathered} bytes would be gathered for ops without a sharding rule, more than max_gather = "
        f"{setting.max_gather:g} times the queries, keys and values ({budget:.0f} bytes): {ops}"
    )


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return math.prod(hint(size) for size in value.shape) * value.element_size()


def _emitter(setting: ParallelSetting) -> Emit:
    def emit(rewriting: Rewriting, plan: SitePlan) -> None:
        nodes = _tensors(plan.site)
        given = {name: rewriting.part(x, plan.needed(name), plan.site.node) for name, x in nodes.items()}
        gathered = all(rewriting.is_taken_whole(nodes[name]) for name in ("key", "value"))
        like, layout, key_layout = plan.site.node.meta["val"][0], plan.query_layout, plan.key_layout
        options = _options(plan.site, setting)
        call = _call(given, [x.meta["val"] for x in given.values()], options)
        chosen = _chosen(plan, call, layout, key_layout, setting, gathered)
        if chosen.takes_whole_keys:
            assert key_layout is not None
            given |= _gathered_keys(rewriting, plan.site.node, given["key"], given["value"], key_layout)

        def run(*values: Tensor) -> tuple[Tensor, Tensor | None]:
            *tensors, ranks = values
            out, lse = chosen.emit(_call(given, tensors, options), ranks)
            return in_order_of(out, like), lse

        results = rewriting.traced(plan.site.node, run, [*given.values(), rewriting.ranks])
        _replace(plan.site, results, lambda old, new: rewriting.adopt(old, new, Sharding(2, layout)))

    return emit


def _share_inputs(
    gm: GraphModule, plan: Plan, setting: ParallelSetting, decompositions: Mapping[Any, Callable]
) -> None:
    """The graph of one rank's rows, as it is, with a scheme at every attention and positions of the whole sequence."""
    zigzag = setting.placement == "zigzag"
    found = sources(plan)
    reasons = [found.refused, *(refuse_site(x, x.query_layout.length, zigzag) for x in plan.sites.values())]
    if any(reasons):
        raise SchemeError("parallel: " + "; ".join(dict.fromkeys(reason for reason in reasons if reason)))
    ranks = _ranks_input(gm)
    seen: dict[Any, fx.Node] = {}

    def whole(local: SequenceLayout) -> SequenceLayout:
        return whole_layout(local, setting.mesh, zigzag)

    for node, local in found.positions:
        layout = whole(local)
        positions = partial(global_positions, node.meta["val"].dtype, layout)
        (new,) = trace_before(gm, node, positions, [ranks], decompositions, seen)
        node.replace_all_uses_with(new)
    for plan_of_site in plan.sites.values():
        _describe(plan_of_site.site)
        if plan_of_site.key_layout is not None:
            layouts = whole(plan_of_site.query_layout), whole(plan_of_site.key_layout)
            _share_site(gm, plan_of_site, *layouts, setting, ranks, decompositions, seen)
    gm.graph.eliminate_dead_code()


def _share_site(
    gm: GraphModule,
    plan: SitePlan,
    layout: SequenceLayout,
    key_layout: SequenceLayout,
    setting: ParallelSetting,
    ranks: fx.Node,
    decompositions: Mapping[Any, Callable],
    seen: dict,
) -> None:
    given, options, like = _tensors(plan.site), _options(plan.site, setting), plan.site.node.meta["val"][0]
    call = _call(given, [x.meta["val"] for x in given.values()], options)
    chosen = _chosen(plan, call, layout, key_layout, setting, False)

    def run(*values: Tensor) -> tuple[Tensor, Tensor | None]:
        *tensors, ranks = values
        call = _call(given, tensors, options)
        mask, bias = (
            None if x is None else gathered_columns(x, key_layout, setting.mesh) for x in (call.mask, call.bias)
        )
        out, lse = chosen.emit(replace(call, mask=mask, bias=bias), ranks)
        return in_order_of(out, like), lse

    results = trace_before(gm, plan.site.node, run, [*given.values(), ranks], decompositions, seen)
    _replace(plan.site, results, lambda old, new: old.replace_all_uses_with(new))


def _tensors(site: AttentionSite) -> dict[str, fx.Node]:
    found = {name: site.argument(name) for name in _TENSORS}
    return {name: node for name, node in found.items() if node is not None}


def _options(site: AttentionSite, setting: ParallelSetting) -> dict[str, Any]:
    """What the call has beside tensors."""
    options = {name: x.meta["val"] if isinstance(x, fx.Node) else x for name, x in site.node.kwargs.items()}
    options = {name: x for name, x in options.items() if name not in _TENSORS}
    needs_lse = site.output(1) is not None
    return {**options, "needs_lse": needs_lse, "platform": setting.platform, "inner": setting.inner}


def _call(names: Iterable[str], tensors: Sequence[Tensor], options: dict[str, Any]) -> AttentionCall:
    given: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return AttentionCall(**given, **options)


def _chosen(
    plan: SitePlan,
    call: AttentionCall,
    layout: SequenceLayout,
    key_layout: SequenceLayout | None,
    setting: ParallelSetting,
    keys_are_gathered: bool,
) -> Chosen:
    """The scheme of an attention, noted in its record. Raises SchemeError where none can serve it."""
    chosen = choose_scheme(call, layout, key_layout, setting.mesh, setting.schemes, keys_are_gathered)
    if chosen is None:
        assert key_layout is not None
        clauses = refusals(call, layout, key_layout, setting.mesh, setting.schemes)
        reasons = "; ".join(f"{name}: {clause}" for name, clause in clauses)
        name = plan.site.record.module or place(plan.site.node)
        raise SchemeError(f"parallel: no scheme can serve the attention at {name}: {reasons}")
    plan.site.record.scheme, plan.site.record.sent = chosen.name, str(chosen.sent)
    plan.site.record.collectives = chosen.collectives
    plan.site.record.refusals += chosen.refusals
    if setting.note is not None:
        setting.note(plan.site.record, chosen.schedule(call))
    return chosen


def _replace(site: AttentionSite, results: list[fx.Node | None], put: Callable[[fx.Node, fx.Node], None]) -> None:
    """Put the results in the place of the attention's."""
    for getitem in list(site.node.users):
        result = results[getitem.args[1]]
        if getitem.users and result is not None:
            put(getitem, result)
        site.node.graph.erase_node(getitem)
    site.node.graph.erase_node(site.node)


_TENSORS = ("query", "key", "value", "mask", "bias", "sinks")


def _gathered_keys(
    rewriting: Rewriting, anchor: fx.Node, key: fx.Node, value: fx.Node, layout: SequenceLayout
) -> dict[str, fx.Node]:
    """All keys and values from one gather, which whatever else wants them all, as a cache does, shares."""
    known_already = rewriting.gathered
    if key not in known_already or value not in known_already:
        likes = [rewriting.global_values.get(x) for x in (key, value)]

        def gather(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            found = gather_kv(key, value, layout, rewriting.mesh)
            return tuple(x if like is None else conform(x, like) for x, like in zip(found, likes, strict=True))

        both = rewriting.traced(anchor, gather, [key, value])
        known_already.update({x: full for x, full in zip((key, value), both, strict=True)})
    return {"key": known_already[key], "value": known_already[value]}


def _describe(site: AttentionSite) -> None:
    """What the report says of the attention as the model has it: its parts on one rank are nobody's business."""
    record, tensors = site.record, [site.tensor(name) for name in ("query", "key", "value")]
    record.mask, record.lse_used = mask_text(site), site.output(1) is not None
    record.query, record.key, record.value = (shape_text(x) for x in tensors if x is not None)


def _gather_row(source: fx.Node, user: fx.Node) -> tuple[str, str, str]:
    value = source.meta["val"]
    return place(user), str(tuple(str(size) for size in value.shape)), str(value.numel() * value.element_size())
