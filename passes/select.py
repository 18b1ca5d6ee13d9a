"""Give every canonical node the first kernel of its platform that takes it, and put that kernel's ops in its place.

before: sgl_npu::attention(q, k, v, ...)
after:  the ops the chosen row emits; every row tried before it leaves its clause in the site's refusals
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx
from torch.fx.graph_module import GraphModule

from sgl_npu.lowering.kernel import AttentionCall, BackwardCall, BackwardKernel, Kernel
from sgl_npu.lowering.platforms import Platform
from sgl_npu.passes.inline import conform, signature, trace_before
from sgl_npu.passes.site import AttentionSite, SiteRecord, mask_text, shape_text, site_id
from sgl_npu.runtime.attention import attention_backward

REFERENCE_ROWS = ("reference", "reference_backward", "packed_reference")


@dataclass(frozen=True)
class Choice:
    """The kernel for one site, the call it was judged by (fake tensors), and the graph nodes of its arguments."""

    kernel: Kernel | BackwardKernel
    call: Any
    nodes: dict[str, fx.Node]


@dataclass
class Lowering:
    """What lowering needs beyond the site: the platform's table, who compiles next, and the ops inserted so far.

    `first` gives the kernels of a site that are tried before the platform's.
    """

    platform: Platform
    inner: str
    decompositions: Mapping[Any, Callable]
    records: dict[int, SiteRecord]
    first: Callable[[AttentionSite, AttentionCall], Sequence[Kernel]] = lambda site, call: ()
    seen: dict = field(default_factory=dict)


def choose(site: AttentionSite, setting: Lowering) -> Choice:
    """Judge the rows in order. The last one takes everything, so there is always a choice."""
    record, node = site.record, site.node
    call, nodes = _forward_call(node.args, dict(node.kwargs))
    call = replace(call, needs_lse=site.output(1) is not None, platform=setting.platform.name, inner=setting.inner)
    record.dtype = str(call.query.dtype).removeprefix("torch.")
    if not record.scheme:  # otherwise this is a block of the attention that the record describes
        record.mask, record.lse_used = mask_text(site), call.needs_lse
        record.query, record.key, record.value = (shape_text(x) for x in (call.query, call.key, call.value))
    kernels = (*setting.first(site, call), *setting.platform.forward)
    names = {kernel.name for kernel in kernels}
    record.refusals = [refusal for refusal in record.refusals if refusal[0] not in names]
    for kernel in kernels:
        if not kernel.applies(call):
            continue
        clause = kernel.refuse(call)
        if clause is None:
            record.kernel, record.op, record.fused = kernel.name, kernel.op, kernel.name not in REFERENCE_ROWS
            return Choice(kernel, call, nodes)
        record.refusals.append((kernel.name, clause))
    raise AssertionError(f"the last kernel of platform {setting.platform.name!r} must take every call")


def lower(gm: GraphModule, site: AttentionSite, setting: Lowering) -> None:
    """Replace a canonical node by what the chosen kernel emits."""
    results = _emit(gm, site.node, choose(site, setting), setting)
    replace_outputs(gm.graph, site.node, results)


def lower_backward(gm: GraphModule, node: fx.Node, setting: Lowering) -> None:
    """The same for a backward node."""
    options = dict(node.kwargs)
    flags: dict[str, Any] = {name: bool(options.pop(name, False)) for name in ("bias_grad", "sinks_grad")}
    forward, nodes = _forward_call(node.args[4:], options)
    grads = dict(zip(("grad_out", "grad_lse", "out", "lse"), node.args[:4], strict=True))
    nodes.update({name: x for name, x in grads.items() if isinstance(x, fx.Node)})
    values: dict[str, Any] = {name: None if x is None else x.meta["val"] for name, x in grads.items()}
    call = BackwardCall(forward, **values, **flags)
    kernel = next(row for row in setting.platform.backward if row.refuse(call) is None)
    found = site_id(node)
    if found in setting.records:
        setting.records[found].backward = kernel.op
    results = _emit(gm, node, Choice(kernel, call, nodes), setting)
    replace_outputs(gm.graph, node, results)


def backward_nodes(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=attention_backward))


_FORWARD_TENSORS = ("query", "key", "value", "mask", "bias", "sinks")
_BACKWARD_TENSORS = ("grad_out", "grad_lse", "out", "lse")


def _forward_call(args: tuple, options: dict[str, Any]) -> tuple[AttentionCall, dict[str, fx.Node]]:
    """The call of fake values that a canonical node's arguments spell, and the nodes among them by name."""
    arguments = {**dict(zip(_FORWARD_TENSORS, args, strict=False)), **options}
    nodes = {name: x for name, x in arguments.items() if isinstance(x, fx.Node)}
    return AttentionCall(
        **{name: nodes[name].meta["val"] if name in nodes else x for name, x in arguments.items()}
    ), nodes


def _emit(gm: GraphModule, node: fx.Node, choice: Choice, setting: Lowering) -> list[fx.Node | None]:
    names = list(choice.nodes)

    def run(*values: Any):
        given = dict(zip(names, values, strict=True))
        if isinstance(choice.call, AttentionCall):
            call: Any = replace(choice.call, **given)
        else:
            outer = {name: given.pop(name) for name in _BACKWARD_TENSORS if name in given}
            call = replace(choice.call, forward=replace(choice.call.forward, **given), **outer)
        results = choice.kernel.emit(call)
        return tuple(None if x is None else conform(x, like) for x, like in zip(results, node.meta["val"], strict=True))

    inputs = [choice.nodes[name] for name in names]
    plain = {name: x for name, x in vars(choice.call).items() if not isinstance(x, Tensor)}
    alike = None
    if isinstance(choice.call, AttentionCall):
        alike = choice.kernel, tuple(names), str(plain), signature(node.meta["val"])
    return trace_before(gm, node, run, inputs, setting.decompositions, setting.seen, alike)


def replace_outputs(graph: fx.Graph, node: fx.Node, results: list[fx.Node | None]) -> None:
    """Put the results in the place of the node's getitems. An output that nobody uses may have no result."""
    for getitem in list(node.users):
        if getitem.users:
            new = results[getitem.args[1]]
            assert new is not None
            getitem.replace_all_uses_with(new)
        graph.erase_node(getitem)
    graph.erase_node(node)
