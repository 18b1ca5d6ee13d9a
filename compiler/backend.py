"""The entry point: `torch.compile(model, backend="sgl_npu", options=..., mode=...)`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.convert_frame import compile_lock
from torch._guards import detect_fake_mode
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.buffer_guard import guarded
from sgl_npu.compiler.graph_copy import copied
from sgl_npu.compiler.graph_text import graph_text
from sgl_npu.compiler.inner import INNERS, Inner, resolve_inner, with_inputs
from sgl_npu.compiler.merged_weights import with_merged_weights
from sgl_npu.compiler.options import Options, OptionsError, parse_options, resolve_platform, sparse_setting
from sgl_npu.compiler.pipeline import PassContext, may_pack_documents, run_passes, timed
from sgl_npu.compiler.report import GraphReport, Report, record_report
from sgl_npu.compiler.sequence_ranks import (
    SequenceRanks,
    check_same_graph,
    lengths_at_hand,
    rank_tensor,
    same_on_all_ranks,
    sequence_ranks,
)
from sgl_npu.compiler.sparse_steps import sparse_condition
from sgl_npu.compiler.trace import Trace
from sgl_npu.compiler.tracer import Tracer
from sgl_npu.compiler.two_forms import by_condition, by_reading
from sgl_npu.lowering.platforms import PLATFORMS
from sgl_npu.passes.buffer_inputs import buffer_inputs, weight_inputs
from sgl_npu.passes.buffers import Buffers
from sgl_npu.passes.capture import capture_attention
from sgl_npu.passes.capture_record import Capture, capturing
from sgl_npu.passes.kept_ops import without_kept
from sgl_npu.passes.merge_projections import other_inputs
from sgl_npu.passes.open_shift import open_shifts
from sgl_npu.passes.site import Refusal

Watch = Callable[[GraphModule, Report, Callable], Callable]

# Dynamo holds its lock and this context while it compiles; a backward is compiled when it first runs, without them.
# Without the context other threads take our tracing for a user's and raise. It is private; measured on torch 2.13.
_compile_session = getattr(torch.compiler, "_compile_session_context", contextlib.nullcontext)


def sgl_npu(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable:
    """Compile one Dynamo graph. Raises OptionsError for what the user got wrong, before anything is compiled."""
    return compile_graph(gm, example_inputs, parse_options(options, mode), record_report)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    deliver: Callable[[Report], None],
    read_buffers: bool = True,
    watch: Watch | None = None,
) -> Callable:
    """Capture, AOTAutograd, passes, inner compiler. `deliver` gets the report once the graph is compiled.

    `watch` makes what runs an inference graph of what the inner compiler made of it; the report has a trace then.

    `read_buffers`: whether masks may be proved from the values that buffers have now. What is returned compares them
    at every call, and compiles the graph again without them once they have changed.
    """
    device = _device(gm, example_inputs)
    platform = resolve_platform(options, device)
    inner_name = resolve_inner(options, platform, device.type)
    inner = INNERS[inner_name](gm, options)
    report = Report(platform, inner_name, trace=None if watch is None else Trace())
    tracer = None if report.trace is None else Tracer(report.trace)
    capture = Capture(platform, device.type, options.strict)
    ranks = sequence_ranks(options.parallel, device.type)
    buffers = Buffers(buffer_inputs(gm, example_inputs) if read_buffers else {})
    untouched = copied(gm) if buffers.inputs else gm
    context = PassContext(
        PLATFORMS[platform],
        inner_name,
        inner.decompositions(),
        capture.records,
        options.strict,
        formulas=options.attention != "sdpa",
        preserve_empty_rows=options.preserve_empty_rows,
        buffers=buffers,
        parallel=None if ranks is None else ranks.setting,
        sparse=sparse_setting(options, device.type),
        weights=_mergeable(options, gm, example_inputs),
        packed=True,
        parallel_report=report.parallel,
        tracer=tracer,
        seconds=report.seconds,
    )

    def compiler(kind: str) -> Callable:
        def compile_part(part: GraphModule, inputs: Sequence[Any]) -> Callable:
            with compile_lock, _compile_session():
                given = replace(context, kind=kind, all_sparse_kernels=[])
                given.packed = may_pack_documents(part.graph, given)
                before = copied(part) if given.packed or given.sparse is not None else None
                traced = tracer if kind != "backward" else None
                if traced is not None:
                    traced.begin(part)
                with timed(report.seconds, "passes"), same_on_all_ranks(ranks):
                    run_passes(part, given)
                if traced is not None:
                    traced.end(part)
                labels = {} if ranks is None else ranks.labels
                report.graphs.append(GraphReport(kind, graph_text(part, labels), len(part.graph.nodes)))
                if ranks is not None:
                    return _for_one_rank(part, inputs, kind, inner, inner_name, report, ranks, device)
                holds = sparse_condition(part.graph, given.all_sparse_kernels)
                with timed(report.seconds, "inner"):
                    if kind == "backward":
                        return inner.backward(part, inputs)
                    seen = watch if kind == "inference" else None
                    added = [node.meta["val"] for node in other_inputs(part.graph)[len(inputs) :]]
                    compiled = forward(part, [*inputs, *added], kind == "inference", seen)
                if before is not None and given.read_documents is not None:
                    masked = other_form("masks of documents", before, replace(given, packed=False), inputs)
                    return by_reading(compiled, masked, given.read_documents)
                if before is None or holds is None:
                    return compiled
                return by_condition(compiled, other_form("dense", before, replace(given, sparse=None), inputs), holds)

        def other_form(name: str, part: GraphModule, given: PassContext, inputs: Sequence[Any]) -> Callable:
            """The same graph compiled for calls that the first form is not for, whose sites are the report's."""
            records = {number: replace(record) for number, record in context.records.items()}
            with timed(report.seconds, "passes"):
                run_passes(part, replace(given, records=records, tracer=None))
            report.graphs.append(GraphReport(f"inference, {name}", graph_text(part), len(part.graph.nodes)))
            with timed(report.seconds, "inner"):
                return forward(part, inputs, True)

        def forward(
            part: GraphModule, inputs: Sequence[Any], is_inference: bool, seen: Watch | None = None
        ) -> Callable:
            def compile_whole(part: GraphModule, inputs: Sequence[Any]) -> Callable:
                compiled = inner.forward(part, inputs, is_inference=is_inference)
                return compiled if seen is None else seen(part, report, compiled)

            return with_merged_weights(part, inputs, compile_whole)

        return compile_part

    with timed(report.seconds, "total"):
        if options.attention != "sdpa":
            with timed(report.seconds, "capture"):
                capture_attention(gm, capture)
        with capturing(capture), inner.context():
            compiled = _aot(gm, example_inputs, inner, context.decompositions, compiler)
    report.sites = [capture.records[number] for number in sorted(capture.records)]
    deliver(report)

    def without_buffers() -> Callable:
        def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
            return compile_graph(gm, example_inputs, options, deliver, False, watch)

        def run(*args: Any) -> Any:
            return untouched(*args)

        run.__code__ = run.__code__.replace()  # Dynamo caches by code object, and every graph has its own
        return torch.compile(run, backend=backend)

    return guarded(compiled, buffers, without_buffers)


def _mergeable(options: Options, gm: GraphModule, inputs: Sequence[Any]) -> Collection[int] | Refusal | None:
    """The inputs that are weights to merge, or why none are; None where nobody asks."""
    if not options.merge_projections:
        return None
    if options.parallel.ranks > 1:
        return Refusal("ranks share the sequence")
    return weight_inputs(gm, inputs)


def _for_one_rank(
    part: GraphModule,
    inputs: Sequence[Any],
    kind: str,
    inner: Inner,
    inner_name: str,
    report: Report,
    ranks: SequenceRanks,
    device: torch.device,
) -> Callable:
    """Compile the graph of one rank, once it is known that all have the same one."""
    if kind != "inference":
        raise OptionsError(
            "parallel: the graph records gradients, and sequence parallelism is for inference; call the model under "
            "torch.no_grad() or torch.inference_mode()"
        )
    check_same_graph(report.graphs[-1].text, ranks, lengths_at_hand(part.graph))
    if inner_name != "eager":
        open_shifts(part, inner.decompositions())
    added = list(part.graph.find_nodes(op="placeholder"))[len(inputs) :]
    with timed(report.seconds, "inner"):
        compiled = inner.forward(part, [*inputs, *(node.meta["val"] for node in added)], is_inference=True)
    if not added:
        return compiled
    tensors = [rank_tensor(ranks.setting, device) for _ in added]
    return with_inputs(compiled, lambda _: tensors)


def _aot(
    gm: GraphModule,
    inputs: Sequence[Any],
    inner: Inner,
    decompositions: Mapping[Any, Callable],
    compiler: Callable[[str], Callable],
) -> Callable:
    fake_mode = detect_fake_mode(inputs)
    with torch._guards.tracing(torch._guards.TracingContext.try_get() or torch._guards.TracingContext(fake_mode)):
        return aot_autograd(
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            inference_compiler=compiler("inference"),
            partition_fn=inner.partition,
            decompositions=without_kept(decompositions),
            keep_inference_input_mutations=True,
        )(gm, inputs)


def _device(gm: GraphModule, inputs: Sequence[Any]) -> torch.device:
    """The device of the first tensor, input or made in the graph, that is not on the CPU, else the CPU."""
    values = [*inputs, *(node.meta.get("example_value") for node in gm.graph.nodes)]
    devices = [x.device for x in values if isinstance(x, torch.Tensor)]
    return next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))
