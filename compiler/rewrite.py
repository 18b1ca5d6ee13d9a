"""`rewrite`: the passes over a program of torch.export, which comes out as another program.

torch.export program
  └ run_decompositions: attention calls become canonical nodes, composite ops open up, softmax and bmm stay whole
      └ the passes of the pipeline
          └ a program with the same signature, state and dynamic shapes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.graph_copy import copied
from sgl_npu.compiler.graph_text import graph_text
from sgl_npu.compiler.options import Options, OptionsError, parse_options, resolve_platform, sparse_setting
from sgl_npu.compiler.pipeline import PassContext, run_passes, timed
from sgl_npu.compiler.report import GraphReport, Report, record_report
from sgl_npu.lowering.platforms import PLATFORMS
from sgl_npu.passes import near_miss
from sgl_npu.passes.buffer_inputs import BufferInput
from sgl_npu.passes.buffers import Buffers
from sgl_npu.passes.capture import visible_order
from sgl_npu.passes.capture_mha import transformer_encoder_layer
from sgl_npu.passes.capture_record import Capture, capturing
from sgl_npu.passes.capture_sdpa import canonical_sdpa
from sgl_npu.passes.site import META_KEY, Refusal, mark_site
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.tensor_state import TensorState

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_ENCODER_LAYER = aten._transformer_encoder_layer_fwd.default
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_SPELLINGS = {
    _SDPA: "scaled_dot_product_attention",
    _ENCODER_LAYER: "nn.TransformerEncoderLayer fast path",
    attention: "sgl_npu::attention",
}


def rewrite(program: ExportedProgram, options: Mapping[str, Any] | Options | None = None) -> ExportedProgram:
    """A program for inference with every attention of `program` in the op that its platform has for it.

    Takes what `torch.export.export` returns, decomposed or not, with static or dynamic shapes; it is left as it is.
    The result shares its parameters and buffers, has the same inputs, outputs and range constraints, can be saved,
    loaded (after `import sgl_npu`) and compiled further, and its attention has no backward. Masks are proved from
    the graph and from constants, never from buffers, which a program may be given anew. The report is the last of
    `sgl_npu.reports()`.

    `options` are those of the backend that do not concern an inner compiler. Raises TypeError for anything but an
    ExportedProgram and OptionsError for bad options, before anything is rewritten.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"rewrite: program = {program!r} is not an ExportedProgram; pass torch.export.export(model, args), "
            'or compile the model with torch.compile(model, backend="sgl_npu")'
        )
    parsed = _checked(parse_options(options))
    device = _device(program)
    platform = resolve_platform(parsed, device)
    report, capture = Report(platform, "eager"), Capture(platform, device.type, parsed.strict)
    with timed(report.seconds, "total"), torch.no_grad():
        with timed(report.seconds, "capture"), capturing(capture):
            program, table = _marked(program, capture, parsed)
            program = program.run_decompositions(table)
        gm = program.graph_module
        _drop_assertions(gm)
        context = PassContext(
            PLATFORMS[platform],
            "eager",
            {},
            capture.records,
            parsed.strict,
            formulas=parsed.attention != "sdpa",
            preserve_empty_rows=parsed.preserve_empty_rows,
            buffers=_constants(program),
            sparse=sparse_setting(parsed, device.type),
            weights=Refusal("a program keeps its parameters as they are") if parsed.merge_projections else None,
            seconds=report.seconds,
        )
        with timed(report.seconds, "passes"):
            run_passes(gm, context)
        _unmark(gm)
        program = _with_graph(program, gm)
    report.graphs.append(GraphReport("inference", graph_text(gm), len(gm.graph.nodes)))
    report.sites = [capture.records[number] for number in sorted(capture.records)]
    record_report(report)
    return program


def _checked(options: Options) -> Options:
    for name, neutral in (("inner", ("auto", "eager")), ("mode", ("default",)), ("inner_options", ({},))):
        value = getattr(options, name)
        if value not in neutral:
            raise OptionsError(f"{name} = {value!r}: rewrite compiles nothing; leave it out")
    if (steps := options.attention_config.skip_first_steps) > 0:
        raise OptionsError(
            f"attention_config: skip_first_steps = {steps}: a program is one graph, dense or sparse; leave it out, and "
            "rewrite the program a second time with attention = 'auto' for the first steps"
        )
    return options


def _device(program: ExportedProgram) -> torch.device:
    """The device of the first tensor that is not on the CPU, else the CPU."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    devices = (x.device for x in values if isinstance(x, Tensor))
    return next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))


def _marked(
    program: ExportedProgram, capture: Capture, options: Options
) -> tuple[ExportedProgram, dict[Any, Callable]]:
    """A copy whose attention calls are tied to their records, and the table that turns them into canonical nodes."""
    gm = copied(program.graph_module)
    _unmark(gm)
    orders: dict[int, tuple[int, ...] | None] = {}
    for node in _nodes(gm):
        if near_miss.is_hand_written_attention(node):
            record = capture.new_record(node, near_miss.SPELLING)
            record.refusals.append(("capture", near_miss.REASON))
        elif node.op == "call_function" and node.target in _SPELLINGS and options.attention != "sdpa":
            record = capture.new_record(node, _SPELLINGS[node.target])
            orders[record.id] = visible_order(node) if node.target is _SDPA else None
        else:
            continue
        mark_site(node, record)
    table: dict[Any, Callable] = {
        op: rule
        for op, rule in torch.export.default_decompositions().items()
        if isinstance(op, torch._ops.OpOverload) and op.has_kernel_for_dispatch_key(_COMPOSITE)
    }
    if options.attention != "sdpa":
        table[_SDPA] = _open_sdpa(orders)
        table[_ENCODER_LAYER] = lambda *args, **kwargs: transformer_encoder_layer(*args, **kwargs, site=_current_site())
    return _with_graph(program, gm), table


def _open_sdpa(orders: Mapping[int, tuple[int, ...] | None]) -> Callable[..., Tensor]:
    """The canonical op in the place of a call; torch's own decomposition for what capture refuses."""
    inside = False

    def run(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal inside
        site = _current_site()
        if inside or site not in orders:
            return _SDPA._op_dk(_COMPOSITE, *args, **kwargs)
        inside = True
        try:
            return canonical_sdpa(*args, **kwargs, site=site, order=orders[site])
        finally:
            inside = False

    return run


def _current_site() -> int:
    """The record of the node that is being traced, -1 where it has none."""
    return (torch.fx.traceback.get_current_meta().get("custom") or {}).get(META_KEY, -1)


def _constants(program: ExportedProgram) -> Buffers:
    """The program's constants, which unlike buffers stay what they are."""
    found = {}
    for number, spec in enumerate(program.graph_signature.input_specs):
        value = program.constants.get(spec.target or "")
        if spec.kind is InputKind.CONSTANT_TENSOR and type(value) is Tensor and not value.is_inference():
            found[number] = BufferInput(number, str(spec.target), TensorState.of(value))
    numbers = {spec.arg.name: number for number, spec in enumerate(program.graph_signature.input_specs)}
    return Buffers(found, number_of=lambda node: numbers.get(node.name), constant=True)


def _with_graph(program: ExportedProgram, gm: GraphModule) -> ExportedProgram:
    """The program with another graph, of the same inputs; its outputs may be other nodes than before."""
    old = program.graph_signature
    for spec, node in zip(old.input_specs, gm.graph.find_nodes(op="placeholder"), strict=True):
        node.name = node.target = spec.arg.name  # copying a graph renames nodes that are called like Python's own
    outputs, renamed = [], {}
    for spec, node in zip(old.output_specs, gm.graph.output_node().args[0], strict=True):
        if isinstance(node, fx.Node) and hasattr(spec.arg, "name"):
            renamed[spec.arg.name] = node.name
            spec = replace(spec, arg=replace(spec.arg, name=node.name))
        outputs.append(spec)
    calls = deepcopy(program.module_call_graph)
    for entry in calls:
        for output in entry.signature.outputs if entry.signature else ():
            if isinstance(output, TensorArgument):
                output.name = renamed.get(output.name, output.name)
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=ExportGraphSignature(list(old.input_specs), outputs),
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _drop_assertions(gm: GraphModule) -> None:
    """The dtypes that a program asserts on the way are those it was traced with; the assertions would be users."""
    for node in list(_nodes(gm)):
        if node.target is aten._assert_tensor_metadata.default:
            node.graph.erase_node(node)


def _unmark(gm: GraphModule) -> None:
    """Forget records: they belong to one rewriting."""
    for node in _nodes(gm):
        if META_KEY in (node.meta.get("custom") or {}):
            node.meta["custom"] = {name: x for name, x in node.meta["custom"].items() if name != META_KEY}


def _nodes(gm: GraphModule) -> Iterator[fx.Node]:
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes
