"""Give every attention over packed sequences the first kernel of its platform that takes it.

before: sgl_npu::packed_attention(q, k, v, [s0, s1], [s2, s3], block_table, ...)
after:  the ops the chosen row emits; every row tried before it leaves its clause in the site's refusals
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx
from torch.fx.graph_module import GraphModule

from sgl_npu.lowering.packed import PackedCall, PackedKernel
from sgl_npu.passes.inline import conform, trace_before
from sgl_npu.passes.select import REFERENCE_ROWS, Lowering, replace_outputs
from sgl_npu.passes.site import SiteRecord, mark_site, new_record, record_of, shape_text
from sgl_npu.runtime.packed_attention import packed_attention

PACKED_SPELLING = "ops.attention"
_POSITIONAL = ("query", "key", "value", "ends", "kv_lengths", "block_table", "sinks")


def lower_packed(gm: GraphModule, setting: Lowering) -> None:
    for node in list(gm.graph.find_nodes(op="call_function", target=packed_attention)):
        record = record_of(node, setting.records)
        if record is None:
            record = new_record(node, PACKED_SPELLING, setting.records)
            mark_site(node, record)
        _lower(gm, node, record, setting)


def _lower(gm: GraphModule, node: fx.Node, record: SiteRecord, setting: Lowering) -> None:
    arguments = {**dict(zip(_POSITIONAL, node.args, strict=False)), **node.kwargs}
    used = any(user.args[1] == 1 and user.users for user in node.users)
    call = replace(PackedCall(**fx.map_arg(arguments, lambda n: n.meta["val"])), needs_lse=used)
    kernel = _choose(call, record, setting)
    emit = kernel.emit
    if emit is None:
        return
    inputs = list(dict.fromkeys(node.all_input_nodes))

    def run(*values: Any):
        given = dict(zip(inputs, values, strict=True))
        results = emit(replace(PackedCall(**fx.map_arg(arguments, given.__getitem__)), needs_lse=used))
        return tuple(None if x is None else conform(x, like) for x, like in zip(results, node.meta["val"], strict=True))

    replace_outputs(gm.graph, node, trace_before(gm, node, run, inputs, setting.decompositions, setting.seen))


def _choose(call: PackedCall, record: SiteRecord, setting: Lowering) -> PackedKernel:
    record.dtype = str(call.query.dtype).removeprefix("torch.")
    record.mask, record.lse_used = _mask_text(call, record.tensor_mask), call.needs_lse
    record.query, record.key, record.value = (shape_text(x) for x in (call.query, call.key, call.value))
    names = {kernel.name for kernel in setting.platform.packed}
    record.refusals = [refusal for refusal in record.refusals if refusal[0] not in names]
    for kernel in setting.platform.packed:
        if not kernel.applies(call):
            continue
        clause = kernel.refuse(call)
        if clause is None:
            record.kernel, record.op, record.fused = kernel.name, kernel.op, kernel.name not in REFERENCE_ROWS
            return kernel
        record.refusals.append((kernel.name, clause))
    raise AssertionError(f"the last packed kernel of platform {setting.platform.name!r} must take every call")


def _mask_text(call: PackedCall, documents: str) -> str:
    """In the report's words; sides are counted from each query's own position."""
    words = [documents] if documents else []
    if call.before is None and call.after == 0:
        words.insert(0, "causal" if documents else "causal (bottom-right)")
    elif call.before is not None or call.after is not None:
        sides = ("inf" if side is None else str(side) for side in (call.before, call.after))
        words.insert(0, f"window({', '.join(sides)})")
    return " & ".join(words) or "full"
