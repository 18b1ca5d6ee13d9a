"""Compile every graph that a call reaches and run none: parameters and inputs have shapes and no data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.graph_module import GraphModule
from torch.utils._pytree import tree_leaves

from sgl_npu.compiler.backend import compile_graph
from sgl_npu.compiler.explain import DYNAMO_SETTINGS
from sgl_npu.compiler.explain_target import Target, TargetError
from sgl_npu.compiler.graph_copy import copied
from sgl_npu.compiler.inner_ascend import Compilation, recording
from sgl_npu.compiler.options import Options, OptionsError
from sgl_npu.compiler.report import Report, merge


@dataclass
class CompiledGraph:
    """What came of one Dynamo graph: `compilations` are those of an Ascend compiler, `failure` what ended it."""

    reports: list[Report] = field(default_factory=list)
    compilations: list[Compilation] = field(default_factory=list)
    failure: Exception | None = None


@dataclass
class Compiled:
    """The graphs of a call, in the order in which it reaches them, compiled for `device`."""

    device: str
    graphs: list[CompiledGraph] = field(default_factory=list)

    @property
    def report(self) -> Report:
        return merge(report for graph in self.graphs for report in graph.reports)


def compile_only(target: Target, options: Options, dynamic: bool) -> Compiled:
    """Compile the call's graphs for the machine's NPU, or, without one, as CPU tensors.

    A graph that fails to compile is noted, and the next one is compiled. `dynamic`: sizes of the inputs are symbols.
    """
    device = _device(target, options)
    found = Compiled(device)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        original, graph = copied(gm), CompiledGraph()
        found.graphs.append(graph)
        with recording() as graph.compilations:
            try:
                compile_graph(gm, example_inputs, options, graph.reports.append)
            except OptionsError:
                raise
            except Exception as error:
                graph.failure = error
        return _keeping_symbols(original) if dynamic else original.forward

    call = _without_data(target, device)
    if dynamic:
        _mark_sizes(_tensors(call.args, call.kwargs))
    with torch._dynamo.config.patch(DYNAMO_SETTINGS), call.mode, torch.no_grad():
        try:
            # Not dynamic=True: it makes the numbers of a model symbols as well.
            torch.compile(call.model, backend=backend, dynamic=None if dynamic else False)(*call.args, **call.kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, OptionsError):
                raise failure.inner_exception from None
            raise
    return found


def _device(target: Target, options: Options) -> str:
    """The platform's device where the machine has one. What is no module cannot be moved, and stays on the CPU."""
    name = options.platform
    device = getattr(torch, name, None)
    return name if isinstance(target.model, nn.Module) and device is not None and device.is_available() else "cpu"


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _mark_sizes(inputs: Sequence[torch.Tensor]) -> None:
    """Make symbols of all sizes that the model leaves open, unless who made the inputs has marked some."""
    if any(_marks(tensor) for tensor in inputs):
        return
    for tensor in inputs:
        for axis in range(tensor.dim()):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)


def _marks(tensor: torch.Tensor) -> dict[str, Any]:
    """What `torch._dynamo.mark_dynamic` and its kin have left on a tensor (seen in torch 2.13)."""
    return {name: value for name, value in vars(tensor).items() if name.startswith("_dynamo_")}


def _keeping_symbols(gm: GraphModule) -> Callable:
    """Run the graph; sizes of its results that are symbols in it are symbols in the next graph too."""
    (results,) = gm.graph.find_nodes(op="output")[0].args
    values = [getattr(result, "meta", {}).get("example_value") for result in results]

    def run(*inputs: Any) -> Any:
        outputs = gm(*inputs)
        for output, value in zip(outputs, values, strict=True):
            for axis, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
                if isinstance(size, torch.SymInt):
                    torch._dynamo.maybe_mark_dynamic(output, axis)
        return outputs

    return run


def _without_data(target: Target, device: str) -> Target:
    """A copy on `device` whose parameters and inputs hold no data. Buffers do: masks are proved from their values."""
    mode = target.mode if isinstance(target.mode, FakeTensorMode) else FakeTensorMode(allow_non_fake_inputs=True)
    module = target.model if isinstance(target.model, nn.Module) else nn.Module()
    copies: dict[int, Any] = {}
    for tensor in (*module.parameters(), *_tensors(target.args, target.kwargs)):
        fake = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
        with mode, torch.no_grad():
            moved = fake.to(device)
        if isinstance(tensor, nn.Parameter) and not isinstance(moved, nn.Parameter):
            moved = nn.Parameter(moved, tensor.requires_grad)
        vars(moved).update(_marks(tensor))
        copies[id(tensor)] = moved
    for buffer in module.buffers():
        with mode if isinstance(buffer, FakeTensor) else torch.no_grad():
            copies[id(buffer)] = buffer.to(device)
    try:
        model, args, kwargs = copy.deepcopy((target.model, target.args, target.kwargs), copies)
    except Exception as error:
        raise TargetError(f"the model or its inputs cannot be copied ({error}); pass plain tensors as inputs") from None
    return replace(target, model=model, args=args, kwargs=kwargs, mode=mode)
