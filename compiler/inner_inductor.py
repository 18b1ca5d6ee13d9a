"""Inductor as the inner compiler.

Inductor has no public entry for a graph that is already past AOTAutograd. This file is the one place that uses its
private parts, as they are in torch 2.13: `select_decomp_table`, `_recursive_joint_graph_passes`, `compile_fx_inner`,
`TracingContext.report_output_strides` and what `compile_fx` prepares for them. (2.8 has them too, with a shorter
signature of the second.)
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx as inductor
from torch._inductor import config as inductor_config
from torch._inductor.cudagraph_utils import BoxedDeviceIndex
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import BoxedBool, count_tangents, num_fw_fixed_arguments, output_node
from torch._inductor.virtualized import V
from torch._prims_common import suggest_memory_format
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.options import Options, OptionsError

aten = torch.ops.aten

_graph_ids = itertools.count(1_000_000)  # apart from the ids compile_fx hands out itself


class Inductor:
    """One compilation: forward and backward share the CUDA-graph decision and the device."""

    def __init__(self, dynamo_graph: GraphModule, options: Options) -> None:
        self.patches = _config_patches(options)
        self.dynamo_outputs = len(torch.utils._pytree.arg_tree_leaves(*output_node(dynamo_graph).args))
        self.dynamo_inputs = len(dynamo_graph.graph.find_nodes(op="placeholder"))
        self.graph_id = next(_graph_ids)
        self.device = BoxedDeviceIndex(None)
        with self._config():
            self.cudagraphs = BoxedBool(inductor_config.triton.cudagraphs)

    def _config(self) -> contextlib.AbstractContextManager:
        return inductor_config.patch(self.patches) if self.patches else contextlib.nullcontext()

    def decompositions(self) -> Mapping[Any, Callable]:
        with self._config():
            table = select_decomp_table()
        return (
            {**table, aten.cat.default: partial(_cat, table[aten.cat.default])} if aten.cat.default in table else table
        )

    @contextlib.contextmanager
    def context(self):
        with functorch_config.patch(unlift_effect_tokens=True), self._config():
            yield

    def partition(self, joint: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        with self._config(), _fake_mode(inputs):
            joint = _joint_graph_passes(joint, inputs)
            return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **kwargs)

    def forward(self, gm: GraphModule, inputs: Sequence[Any], is_inference: bool) -> Callable:
        with self._config(), _whole_flex_attention(gm), _fake_mode(inputs), _own_strides():
            if is_inference:
                gm = _joint_graph_passes(gm, inputs)
            fixed = num_fw_fixed_arguments(self.dynamo_inputs, len(inputs))
            self._mark_user_outputs(gm, is_inference)
            return inductor.compile_fx_inner(
                gm,
                inputs,
                static_input_idxs=inductor.get_static_input_idxs(fixed),
                cudagraphs=self.cudagraphs,
                graph_id=self.graph_id,
                is_inference=is_inference,
                boxed_forward_device_index=self.device,
            )

    def backward(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        with self._config(), _fake_mode(inputs):
            output = output_node(gm)
            output.meta["user_visible_output_idxs"] = (
                _tensor_outputs(output) if inductor_config.bw_outputs_user_visible else []
            )
            return inductor.compile_fx_inner(
                gm,
                inputs,
                static_input_idxs=list(range(count_tangents(gm))),
                cudagraphs=self.cudagraphs,
                is_backward=True,
                graph_id=self.graph_id,
                boxed_forward_device_index=self.device,
            )

    def _mark_user_outputs(self, gm: GraphModule, is_inference: bool) -> None:
        """Outputs that the user sees keep their strides; mutated inputs come before them in training graphs."""
        output = output_node(gm)
        start = 0
        context = torch._guards.TracingContext.try_get()
        if context is not None and context.fw_metadata and not is_inference:
            start = context.fw_metadata.num_mutated_inp_runtime_indices
        visible = range(start, start + self.dynamo_outputs) if inductor_config.keep_output_stride else ()
        output.meta["user_visible_output_idxs"] = [i for i in _tensor_outputs(output) if i in visible]


@contextlib.contextmanager
def _own_strides():
    """Where one graph has two forms, as sparse and dense, both tell AOTAutograd the strides of their outputs.

    Inductor takes that for an error. The strides are the same: those of the graph's own outputs are kept.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or not context.output_strides:
        yield
        return
    with torch._guards.TracingContext.report_output_strides():
        yield


def _cat(decomposition: Callable, tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    """Inductor's rule keeps the strides of a tensor alone or beside empty ones (torch 2.13); aten's cat does not.

    A cache that a prompt starts is such a cat, of nothing and the keys: with other strides than after every later step
    it would cost one more graph.
    """
    out = decomposition(tensors, dim)
    if out is NotImplemented:
        return out
    formats = {suggest_memory_format(x) for x in tensors}
    return out.contiguous(memory_format=formats.pop() if len(formats) == 1 else torch.contiguous_format)


def _joint_graph_passes(gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """Inductor's own passes over a graph that is not yet split: constant folding, its patterns, its conversions."""
    run: Callable[..., Any] = inductor._recursive_joint_graph_passes
    if "input_device" not in inspect.signature(run).parameters:
        run(gm)
        return gm
    devices = (x.device for x in inputs if isinstance(x, torch.Tensor))
    return run(gm, input_device=next(devices, torch.device("cpu")))


def _tensor_outputs(output: torch.fx.Node) -> list[int]:
    return [i for i, value in enumerate(output.args[0]) if isinstance(value, torch.fx.Node)]


def _whole_flex_attention(gm: GraphModule) -> contextlib.AbstractContextManager:
    """Inductor's C++ FlexAttention raises when pointwise ops are fused behind it (torch 2.13): keep them apart."""
    found = any(node.target is torch.ops.higher_order.flex_attention for node in gm.graph.nodes)
    return inductor_config.patch(epilogue_fusion=False) if found else contextlib.nullcontext()


def _fake_mode(inputs: Sequence[Any]) -> contextlib.AbstractContextManager:
    mode = torch._guards.detect_fake_mode(inputs)
    return V.set_fake_mode(mode) if mode is not None else contextlib.nullcontext()


def _config_patches(options: Options) -> dict[str, Any]:
    """The mode's settings and the user's `inner_options`, checked against Inductor's own config."""
    patches = dict(torch._inductor.list_mode_options(options.mode)) if options.mode != "default" else {}
    settings = inductor_config.get_config_copy()
    for name, value in options.inner_options.items():
        setting = name.replace("-", "_")
        if setting not in settings:
            close = difflib.get_close_matches(setting, settings, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out"
            raise OptionsError(f"inner_options: {name!r} is not a setting of torch._inductor.config; {hint}")
        expected: Any = inductor_config.get_type(setting)  # type: ignore[attr-defined]
        if type(expected) is type and expected is not type(None) and not isinstance(value, expected):
            raise OptionsError(
                f"inner_options: {name} = {value!r}: torch._inductor.config wants {expected.__name__}, "
                f"got {type(value).__name__}"
            )
        patches[setting] = value
    return patches
