"""The hand-over: who compiles the graph after our passes. One row per inner compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.options import ASCEND_INNERS, Options, OptionsError, refuse_mode


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
        if options.inner_options and (options.inner == "eager" or not _has_npu()):
            raise OptionsError(
                f"inner_options = {options.inner_options!r}: inner 'eager' has no options; leave them out"
            )
        refuse_mode(options, "eager")

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


def _npugraph_ex(dynamo_graph: GraphModule, options: Options) -> Inner:
    from sgl_npu.compiler.inner_ascend import NpugraphEx

    return NpugraphEx(dynamo_graph, options)


def _torchair(dynamo_graph: GraphModule, options: Options) -> Inner:
    from sgl_npu.compiler.inner_ascend import Torchair

    return Torchair(dynamo_graph, options)


INNERS: dict[str, Callable[[GraphModule, Options], Inner]] = {
    "inductor": _inductor,
    "eager": Eager,
    "torchair": _torchair,
    "npugraph_ex": _npugraph_ex,
}

# What "auto" means on each platform: the first that is there.
AUTO_INNER = {"cpu": ("inductor",), "cuda": ("inductor",), "npu": ("npugraph_ex", "torchair", "eager")}


def resolve_inner(options: Options, platform: str, device_type: str) -> str:
    """The inner compiler's name. Raises OptionsError where it cannot drive the device.

    On CPU tensors the NPU's graph runs op by op unless another compiler is named: there is no NPU to compile for.
    """
    if options.inner == "auto":
        if platform == "npu" and device_type != "npu":
            return "eager"
        if platform == "cpu" and options.inner_options and _has_npu():
            return "eager"  # as below: the settings are those of the NPU's compiler
        return next(name for name in AUTO_INNER[platform] if name not in ASCEND_INNERS or _is_installed(name))
    if options.inner == "inductor" and device_type == "npu":
        raise OptionsError("inner = 'inductor': Inductor does not compile for NPU tensors; leave inner at 'auto'")
    if options.inner in ASCEND_INNERS and platform != "npu":
        if device_type == "cpu" and _has_npu():
            return "eager"  # a piece of a model that is on an NPU, before a graph break or of sizes alone
        raise OptionsError(
            f"inner = {options.inner!r} compiles for NPUs, but the platform is {platform!r}; "
            "leave inner at 'auto', or move the model and its inputs to 'npu'"
        )
    return options.inner


def with_inputs(compiled: Callable, added: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable:
    """`compiled` with its last inputs computed from the others.

    It is boxed, taking one list which it may empty, if `compiled` is.
    """
    if not getattr(compiled, "_boxed_call", False):
        return lambda *args: compiled(*args, *added(args))

    def run(args: list[Any]) -> Any:
        given = [*args, *added(args)]
        args.clear()
        return compiled(given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _has_npu() -> bool:
    npu = getattr(torch, "npu", None)
    return npu is not None and npu.is_available()


def _is_installed(name: str) -> bool:
    from sgl_npu.compiler.inner_ascend import is_installed

    return is_installed(name)
