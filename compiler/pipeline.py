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
from sgl_npu.passes import layout, repeat_kv, select
from sgl_npu.passes.cleanup import cancel_idle_views
from sgl_npu.passes.site import Refusal, SiteRecord, find_sites


@dataclass
class PassContext:
    """What every pass may read, and the records it writes to."""

    platform: Platform
    inner: str
    decompositions: Mapping[Any, Callable]
    records: dict[int, SiteRecord]
    strict: bool = False
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


def _select(gm: GraphModule, context: PassContext) -> None:
    setting = select.Lowering(context.platform, context.inner, context.decompositions, context.records)
    for site in find_sites(gm.graph, context.records):
        select.lower(gm, site, setting)
    for node in select.backward_nodes(gm.graph):
        select.lower_backward(gm, node, setting)


PASSES: tuple[Pass, ...] = (
    Pass("repeat_kv", _each_site(repeat_kv)),
    Pass("layout", _each_site(layout), platforms=("npu",)),
    Pass("select", _select),
    Pass("cleanup", lambda gm, context: cancel_idle_views(gm.graph), platforms=("npu",)),
)


def run_passes(gm: GraphModule, context: PassContext) -> None:
    """Run every pass that applies. One that fails leaves no trace: its graph is put back and a warning names it."""
    for step in PASSES:
        if not step.platforms or context.platform.name in step.platforms:
            with timed(context.seconds, step.name):
                _run_isolated(step, gm, context)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


def _run_isolated(step: Pass, gm: GraphModule, context: PassContext) -> None:
    backup = copy.deepcopy(gm.graph)
    try:
        step.run(gm, context)
    except Exception as error:
        if context.strict:
            raise
        gm.graph = backup
        for record in context.records.values():
            record.refusals.append((step.name, f"the pass failed and was undone: {error}"))
        warnings.warn(f"sgl_npu: pass {step.name!r} failed and was undone: {error!r}", stacklevel=2)


class timed:
    """Adds the seconds spent in its body to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start
