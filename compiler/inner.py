"""The hand-over: who compiles the graph after our passes. One row per inner compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.options import Options, OptionsError


class Inner(Protocol):
    """One compilation of one Dynamo graph by an inner compiler."""

    def decompositions(self) -> Mapping[Any, Callable]:
        """The table for AOTAutograd."""

    def context(self) -> contextlib.AbstractContextManager:
        """Entered around AOTAutograd."""

    def partition(self, joint: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        """Split a joint graph into forward and backward."""

    def forward(self, gm: GraphModule, inputs: Sequence[Any], is_inference: bool) -> Callable:
        """Compile a forward graph; the result takes one list of inputs (boxed)."""

    def backward(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        """Compile a backward graph."""


class Eager:
    """Runs the rewritten graph op by op: nothing to install, every device, easiest to debug."""

    def __init__(self, dynamo_graph: GraphModule, options: Options) -> None:
        if options.inner_options:
            raise OptionsError(
                f"inner_options = {options.inner_options!r}: inner 'eager' has no options; leave them out"
            )
        if options.mode != "default":
            raise OptionsError(f"mode = {options.mode!r}: modes are Inductor's, and inner is 'eager'; leave mode out")

    def decompositions(self) -> Mapping[Any, Callable]:
        return {}

    def context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def partition(self, joint: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        from functorch.compile import min_cut_rematerialization_partition

        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def forward(self, gm: GraphModule, inputs: Sequence[Any], is_inference: bool) -> Callable:
        from functorch.compile import make_boxed_func

        return make_boxed_func(gm.forward)

    def backward(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        return self.forward(gm, inputs, is_inference=False)


def _inductor(dynamo_graph: GraphModule, options: Options) -> Inner:
    from sgl_npu.compiler.inner_inductor import Inductor

    return Inductor(dynamo_graph, options)


def _ascend_compiler(name: str) -> Callable[[GraphModule, Options], Inner]:
    def absent(dynamo_graph: GraphModule, options: Options) -> Inner:
        raise OptionsError(
            f"inner = {name!r}: this version does not hand graphs to {name} yet; use inner = 'eager', which runs the "
            "same NPU graph op by op"
        )

    return absent


INNERS: dict[str, Callable[[GraphModule, Options], Inner]] = {
    "inductor": _inductor,
    "eager": Eager,
    "torchair": _ascend_compiler("torchair"),
    "npugraph_ex": _ascend_compiler("npugraph_ex"),
}

# What "auto" means on each platform. On NPU, ops run one by one until the Ascend compilers are wired in.
AUTO_INNER = {"cpu": "inductor", "cuda": "inductor", "npu": "eager"}


def resolve_inner(options: Options, platform: str, device_type: str) -> str:
    """The inner compiler's name. Raises OptionsError where it cannot drive the device."""
    if options.inner == "auto":
        return AUTO_INNER[platform]
    if options.inner == "inductor" and device_type == "npu":
        raise OptionsError("inner = 'inductor': Inductor does not compile for NPU tensors; leave inner at 'auto'")
    return options.inner
