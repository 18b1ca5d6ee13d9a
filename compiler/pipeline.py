"""The passes over AOTAutograd's graph, in order, as data; and how they are run: timed, isolated, reported."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.options import OptionsError
from sgl_npu.compiler.tracer import Tracer
from sgl_npu.lowering.platforms import Platform
from sgl_npu.lowering.sparse.setting import SparseSetting
from sgl_npu.passes import (
    documents,
    empty_rows,
    layout,
    match,
    merge_projections,
    qkv_norm_rope,
    repeat_kv,
    select,
    select_packed,
    user_match,
)
from sgl_npu.passes.buffers import Buffers
from sgl_npu.passes.capture import SDPA_SPELLING
from sgl_npu.passes.channel_rules import channels_of
from sgl_npu.passes.cleanup import cancel_idle_views
from sgl_npu.passes.document_reader import Reader
from sgl_npu.passes.graph_sizes import share_sizes
from sgl_npu.passes.kept_ops import decompose_kept
from sgl_npu.passes.mask import MaskProver
from sgl_npu.passes.mask import Match as MaskMatch
from sgl_npu.passes.match_regroup import whole_rows_and_keys
from sgl_npu.passes.match_softmax import Softmax, find_softmaxes
from sgl_npu.passes.near_miss import SPELLING, looks_like_attention
from sgl_npu.passes.parallel import ParallelReport, ParallelSetting, SchemeError, parallelise
from sgl_npu.passes.share_masks import share_masks
from sgl_npu.passes.share_slots import share_slots
from sgl_npu.passes.site import Refusal, SiteRecord, find_sites, new_record, place, record_of
from sgl_npu.passes.sparse import GridError, SparseKernels
from sgl_npu.runtime.npu.package_ops import ensure_package_ops


@dataclass
class PassContext:
    """What every pass may read, and the records it writes to.

    `kind` of graph: inference, forward or backward. `formulas`: whether attention that is written out is matched.
    `buffers`: the inputs whose values may be used in proofs. `sparse_kernels`: what the pass of that name has found in
    the graph at hand, `all_sparse_kernels` in the graphs nested in it too. `weights`: the inputs of Dynamo's graph that
    may be merged with others, or why none may; None where nobody asks for it. `packed`: whether documents in a mask may
    become packed sequences, as whoever runs the graph reads their ends with `read_documents`, once they are inputs.
    `tracer` is told what a reader of the report may want to see, where somebody does.
    """

    platform: Platform
    inner: str
    decompositions: Mapping[Any, Callable]
    records: dict[int, SiteRecord]
    strict: bool = False
    kind: str = "inference"
    formulas: bool = True
    preserve_empty_rows: bool = True
    buffers: Buffers = field(default_factory=Buffers)
    parallel: ParallelSetting | None = None
    sparse: SparseSetting | None = None
    sparse_kernels: SparseKernels | None = None
    all_sparse_kernels: list[SparseKernels] = field(default_factory=list)
    weights: Collection[int] | Refusal | None = None
    packed: bool = False
    read_documents: Reader | None = None
    parallel_report: list[ParallelReport] = field(default_factory=list)
    tracer: Tracer | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A named step over a graph; `platforms` empty means all. `nested`: also over the graphs inside of it."""

    name: str
    run: Callable[[GraphModule, PassContext], None]
    platforms: tuple[str, ...] = ()
    nested: bool = True


def _each_site(module: Any, done: str) -> Callable[[GraphModule, PassContext], None]:
    """A pass over sites: `match` first, `rewrite` only where it matched. `done` says what that means."""

    def run(gm: GraphModule, context: PassContext) -> None:
        for site in find_sites(gm.graph, context.records):
            found = module.match(site)
            if not isinstance(found, Refusal):
                module.rewrite(found)
            if context.tracer is not None:
                name = module.__name__.rpartition(".")[2]
                context.tracer.step(site.record, name, found.reason if isinstance(found, Refusal) else done)

    return run


def _expose_buffers(gm: GraphModule, context: PassContext) -> None:
    if context.kind == "inference":
        context.buffers.expose(gm, context.decompositions)


def _user_match(gm: GraphModule, context: PassContext) -> None:
    if context.kind == "inference":
        user_match.match_all(gm, context.records, context.decompositions, context.strict)


def _matched(
    softmax: Softmax, rewriting: match.Rewriting, prover: MaskProver, context: PassContext
) -> tuple[Softmax, match.Match | Refusal]:
    """The match of a softmax, with what is added to its scores in pieces put where the match can read it."""
    found = match.match(softmax, prover, context.preserve_empty_rows)
    if isinstance(found, Refusal) and whole_rows_and_keys(
        softmax.scores, rewriting.gm, rewriting.decompositions, rewriting.seen
    ):
        anew = (x for x in find_softmaxes(rewriting.gm.graph) if isinstance(x, Softmax) and x.node is softmax.node)
        softmax = next(anew, softmax)
        found = match.match(softmax, prover, context.preserve_empty_rows)
    return softmax, found


def _match(gm: GraphModule, context: PassContext) -> None:
    if context.kind != "inference" or not context.formulas or not find_softmaxes(gm.graph):
        return
    share_sizes(gm.graph)
    rewriting, prover = match.Rewriting(gm, context.decompositions), MaskProver()
    for softmax in find_softmaxes(gm.graph):
        record = record_of(softmax.node, context.records)
        if record is not None and record.spelling == SDPA_SPELLING:
            continue  # capture has refused the call and says why
        found: match.Match | Refusal
        if isinstance(softmax, Refusal):
            found = softmax
        else:
            softmax, found = _matched(softmax, rewriting, prover, context)
        if isinstance(found, Refusal) or isinstance(softmax, Refusal):
            if (
                record is None
                and not isinstance(softmax, Refusal)
                and looks_like_attention(softmax.scores, softmax.node)
            ):
                record = new_record(softmax.node, SPELLING, context.records)
            if record is not None and record.spelling == SPELLING and isinstance(found, Refusal):
                record.refusals, record.deepest = [("match", found.reason)], place(found.node)
            if record is not None and context.tracer is not None:
                context.tracer.found(softmax.node, record)
            continue
        record = record or new_record(softmax.node, SPELLING, context.records)
        record.refusals, record.deepest = [], ""
        if context.tracer is not None:
            context.tracer.found(softmax.node, record)
        context.buffers.note(record, softmax.scores, *(found.scores.product or ()), found.views.value.node)
        match.rewrite(found, record, rewriting)
    gm.graph.eliminate_dead_code()


def _restore_empty_rows(gm: GraphModule, context: PassContext) -> None:
    seen: dict[Any, Any] = {}
    for site in find_sites(gm.graph, context.records):
        found = empty_rows.match(site)
        if not isinstance(found, Refusal):
            empty_rows.rewrite(found, gm, context.decompositions, seen)


def _prove_masks(gm: GraphModule, context: PassContext) -> None:
    prover = MaskProver()
    for site in find_sites(gm.graph, context.records):
        found = prover.match(site)
        prover.describe(site, found)
        kept = []
        if context.tracer is not None:
            context.tracer.given_mask(site)
            kept = prover.kept_conditions(site, found)
        if isinstance(found, MaskMatch):
            context.buffers.note(site.record, site.argument("mask"), site.argument("bias"))
            prover.rewrite(found)
        if context.tracer is not None:
            context.tracer.proved_mask(site, kept)


def _parallelise(gm: GraphModule, context: PassContext) -> None:
    if context.parallel is None:
        return
    note = None if context.tracer is None else context.tracer.scheduled
    setting = replace(context.parallel, platform=context.platform.name, inner=context.inner, note=note)
    try:
        report = parallelise(gm, setting, context.records, context.decompositions)
    except SchemeError as error:
        raise OptionsError(str(error)) from None
    context.parallel_report.append(report)


def _select(gm: GraphModule, context: PassContext) -> None:
    setting = select.Lowering(context.platform, context.inner, context.decompositions, context.records)
    if context.sparse_kernels is not None:
        setting.first = context.sparse_kernels.first
    for site in find_sites(gm.graph, context.records):
        select.lower(gm, site, setting)
        if context.sparse_kernels is not None:
            context.sparse_kernels.describe(site)
    for node in select.backward_nodes(gm.graph):
        select.lower_backward(gm, node, setting)
    select_packed.lower_packed(gm, setting)


def _fuse_rotary(gm: GraphModule, context: PassContext) -> None:
    if context.kind != "inference" or context.sparse is not None:  # the grid is read off what stands before a site
        return
    ensure_package_ops()
    walk = channels_of(gm.graph)
    seen: dict[Any, Any] = {}
    for site in find_sites(gm.graph, context.records):
        found = qkv_norm_rope.match(site, walk, context.inner)
        if isinstance(found, Refusal):
            site.record.rotary = f"not fused: {found.reason}"
            continue
        merged = _merged(found, context)
        if qkv_norm_rope.rewrite(found, gm, context.decompositions, seen, merged):
            site.record.rotary = found.text + ("" if merged is None else f", {merge_projections.text(merged)}")
        else:
            site.record.rotary = "not fused: what rotates it is computed from what another attention shares with it"
    gm.graph.eliminate_dead_code()


def _merged(found: qkv_norm_rope.Match, context: PassContext) -> merge_projections.Match | Refusal | None:
    if context.weights is None:
        return None
    return merge_projections.match(found.parts, context.weights)


def _pack_documents(gm: GraphModule, context: PassContext) -> None:
    context.read_documents = None
    if not context.packed:
        return
    prover, matches = MaskProver(), []
    for site in find_sites(gm.graph, context.records):
        found = documents.match(site, prover)
        reason = "documents became packed sequences"
        if isinstance(found, Refusal):
            reason = found.reason
            if "documents" in site.record.tensor_mask:
                site.record.refusals.append(("documents", reason))
        else:
            matches.append(found)
            if context.tracer is not None:
                context.tracer.packed(site.record, found.documents.before, found.documents.after)
        if context.tracer is not None:
            context.tracer.step(site.record, "documents", reason)
    if matches:
        context.read_documents = documents.rewrite(matches, gm, context.decompositions)


def may_pack_documents(graph: fx.Graph, context: PassContext) -> bool:
    """Whether the graph may get the ends of documents as inputs; one that is shared or sparse does not."""
    alone = context.parallel is None and context.sparse is None
    is_asked = context.packed and context.kind == "inference" and context.platform.name == "npu"
    return alone and is_asked and documents.may_match(graph)


def _choose_sparse(gm: GraphModule, context: PassContext) -> None:
    context.sparse_kernels = None
    if context.sparse is not None:
        sites = find_sites(gm.graph, context.records)
        try:
            kernels = SparseKernels(gm.graph, sites, context.sparse, context.platform.name, context.kind)
        except GridError as error:
            raise OptionsError(str(error)) from None
        context.sparse_kernels = kernels
        context.all_sparse_kernels.append(context.sparse_kernels)


def _decompose_rest(gm: GraphModule, context: PassContext) -> None:
    """What `select` could not lower, as it failed, is decomposed: no inner compiler knows the canonical op."""
    tables = {name: getattr(context.platform, name)[-1:] for name in ("forward", "backward", "packed")}
    last = replace(context.platform, **tables)
    _select(gm, replace(context, platform=last, sparse_kernels=None))


PASSES: tuple[Pass, ...] = (
    Pass("user_match", _user_match),
    Pass("buffers", _expose_buffers),
    Pass("match", _match),
    Pass("repeat_kv", _each_site(repeat_kv, "repeated heads of key and value were taken away")),
    Pass("mask", _prove_masks),
    Pass("share_masks", lambda gm, context: share_masks(gm.graph, find_sites(gm.graph, context.records))),
    Pass("empty_rows", _restore_empty_rows),
    Pass("keep_buffers", lambda gm, context: context.buffers.keep(gm.graph)),
    Pass("parallel", _parallelise, nested=False),
    Pass("layout", _each_site(layout, "computed as (B, S, N, D), no transpose is left"), platforms=("npu",)),
    Pass("qkv_norm_rope", _fuse_rotary, platforms=("npu",)),
    Pass("documents", _pack_documents, platforms=("npu",), nested=False),
    Pass("sparse", _choose_sparse),
    Pass("select", _select),
    Pass("decompose_rest", _decompose_rest),
    Pass("decompose", lambda gm, context: decompose_kept(gm, context.decompositions)),
    Pass("share_slots", lambda gm, context: share_slots(gm.graph), platforms=("npu",)),
    Pass("cleanup", lambda gm, context: cancel_idle_views(gm.graph), platforms=("npu",)),
)


def run_passes(gm: GraphModule, context: PassContext) -> None:
    """Run every pass that applies, over the graph and the graphs nested in it.

    A pass that fails leaves no trace: its graph is put back as if it had never run, and a warning names it.
    """
    steps = [step for step in PASSES if not step.platforms or context.platform.name in step.platforms]
    for part in [module for module in gm.modules() if isinstance(module, GraphModule)]:
        own = [step for step in steps if step.nested or part is gm]
        if context.strict:
            _run(own, part, context)
        else:
            _run_isolated(own, part, context)
        part.graph.eliminate_dead_code()
        part.graph.lint()
        part.recompile()


def _run(steps: Sequence[Pass], gm: GraphModule, context: PassContext) -> tuple[Pass, Exception] | None:
    """Run passes one after the other; the one that failed, with its error, unless strict."""
    for step in steps:
        with timed(context.seconds, step.name):
            try:
                step.run(gm, context)
            except Exception as error:
                if context.strict or isinstance(error, (user_match.MatcherError, OptionsError)):
                    raise
                return step, error
    return None


def _run_isolated(steps: Sequence[Pass], gm: GraphModule, context: PassContext) -> None:
    """One copy of the graph is kept, and taken up again without the pass that failed: copies cost more than passes."""
    backup, records = copy.deepcopy(gm.graph), {number: vars(x).copy() for number, x in context.records.items()}
    failures = []
    while (failed := _run(steps, gm, context)) is not None:
        step, error = failed
        failures.append((step.name, f"the pass failed and was undone: {error}"))
        warnings.warn(f"sgl_npu: pass {step.name!r} failed and was undone: {error!r}", stacklevel=2)
        steps = [other for other in steps if other is not step]
        gm.graph = copy.deepcopy(backup)
        for number in list(context.records):
            if number in records:
                vars(context.records[number]).update(records[number])
            else:
                del context.records[number]
    for record in context.records.values():
        record.refusals = [*record.refusals, *failures]


class timed:
    """Adds the seconds spent in its body to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start
