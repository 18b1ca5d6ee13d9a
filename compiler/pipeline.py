"""The passes over AOTAutograd's graph, in order, as data; and how they are run: timed, isolated, reported."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx.graph_module import GraphModule

from sgl_npu.lowering.platforms import Platform
from sgl_npu.passes import layout, match, repeat_kv, select
from sgl_npu.passes.cleanup import cancel_idle_views
from sgl_npu.passes.kept_ops import decompose_kept
from sgl_npu.passes.mask import MaskProver
from sgl_npu.passes.mask import Match as MaskMatch
from sgl_npu.passes.site import Refusal, SiteRecord, find_sites


@dataclass
class PassContext:
    """What every pass may read, and the records it writes to.

    `kind` of graph: inference, forward or backward. `formulas`: whether attention that is written out is matched.
    """

    platform: Platform
    inner: str
    decompositions: Mapping[Any, Callable]
    records: dict[int, SiteRecord]
    strict: bool = False
    kind: str = "inference"
    formulas: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A named step over a graph; `platforms` empty means all."""

    name: str
    run: Callable[[GraphModule, PassContext], None]
    platforms: tuple[str, ...] = ()


def _each_site(module: Any) -> Callable[[GraphModule, PassContext], None]:
    """A pass over sites: `match` first, `rewrite` only where it matched."""

    def run(gm: GraphModule, context: PassContext) -> None:
        for site in find_sites(gm.graph, context.records):
            found = module.match(site)
            if not isinstance(found, Refusal):
                module.rewrite(found)

    return run


def _match(gm: GraphModule, context: PassContext) -> None:
    if context.kind != "inference" or not context.formulas:
        return
    if not match.softmaxes(gm.graph, context.records):
        return
    match.share_sizes(gm.graph)
    rewriting = match.Rewriting(gm, context.decompositions)
    for softmax in match.softmaxes(gm.graph, context.records):
        found = match.match(softmax)
        record = match.record_of(softmax, context.records)
        if isinstance(found, Refusal):
            if record is not None:
                record.refusals = [("match", found.reason)]
            continue
        record = record or match.new_record(softmax, context.records)
        record.refusals = []
        match.rewrite(found, record, rewriting)
    gm.graph.eliminate_dead_code()


def _prove_masks(gm: GraphModule, context: PassContext) -> None:
    prover = MaskProver()
    for site in find_sites(gm.graph, context.records):
        found = prover.match(site)
        if isinstance(found, MaskMatch):
            prover.rewrite(found)


def _select(gm: GraphModule, context: PassContext) -> None:
    setting = select.Lowering(context.platform, context.inner, context.decompositions, context.records)
    for site in find_sites(gm.graph, context.records):
        select.lower(gm, site, setting)
    for node in select.backward_nodes(gm.graph):
        select.lower_backward(gm, node, setting)


PASSES: tuple[Pass, ...] = (
    Pass("match", _match),
    Pass("repeat_kv", _each_site(repeat_kv)),
    Pass("mask", _prove_masks),
    Pass("layout", _each_site(layout), platforms=("npu",)),
    Pass("select", _select),
    Pass("decompose", lambda gm, context: decompose_kept(gm, context.decompositions)),
    Pass("cleanup", lambda gm, context: cancel_idle_views(gm.graph), platforms=("npu",)),
)


def run_passes(gm: GraphModule, context: PassContext) -> None:
    """Run every pass that applies, over the graph and the graphs nested in it.

    A pass that fails leaves no trace: its graph is put back and a warning names it.
    """
    graphs = [module for module in gm.modules() if isinstance(module, GraphModule)]
    for step in PASSES:
        if not step.platforms or context.platform.name in step.platforms:
            with timed(context.seconds, step.name):
                for part in graphs:
                    _run_isolated(step, part, context)
    for part in graphs:
        part.graph.eliminate_dead_code()
        part.graph.lint()
        part.recompile()


def _run_isolated(step: Pass, gm: GraphModule, context: PassContext) -> None:
    if context.strict:
        step.run(gm, context)
        return
    backup, records = copy.deepcopy(gm.graph), {number: vars(x).copy() for number, x in context.records.items()}
    try:
        step.run(gm, context)
    except Exception as error:
        gm.graph = backup
        for number, record in context.records.items():
            vars(record).update(records.get(number, {}))
            record.refusals = [*record.refusals, (step.name, f"the pass failed and was undone: {error}")]
        warnings.warn(f"sgl_npu: pass {step.name!r} failed and was undone: {error!r}", stacklevel=2)


class timed:
    """Adds the seconds spent in its body to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start
