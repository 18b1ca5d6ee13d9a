"""`explain`: what the backend would do with a call, found out by compiling and running it once."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import detect_fake_mode
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler.backend import compile_graph
from sgl_npu.compiler.options import Options, OptionsError, parse_options
from sgl_npu.compiler.report import Report, merge
from sgl_npu.compiler.sparse_record import sparse_watchers
from sgl_npu.compiler.trace_packed import packed_watchers
from sgl_npu.compiler.trace_values import mask_watchers
from sgl_npu.compiler.watch import watched

# One call may reach any number of graphs, and the same model may be explained any number of times. Shapes are
# those of the call, not generalised from what other calls have seen.
DYNAMO_SETTINGS = {
    "recompile_limit": 1 << 30,
    "accumulated_recompile_limit": 1 << 30,
    "automatic_dynamic_shapes": False,
}
# The backward graph is compiled with its forward, where torch has the switch (2.13 does); nobody calls it here.
_AOT_SETTINGS = {name: True for name in ("force_non_lazy_backward_lowering",) if hasattr(torch._functorch.config, name)}


def explain(
    model: Callable,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> Report:
    """Compile `model` for `model(*args, **kwargs)`, run it once, and report every graph it reached.

    Needs no NPU: with `options={"platform": "npu"}` CPU tensors run on emulated NPU ops. The inner compiler
    is "eager" unless the options name one. What the caller holds stays as it is: arguments are copied before
    they are used, buffers and random state are put back, other compiled models stay compiled, `reports()` does
    not grow. A graph that serves several calls of the same code is one graph. Sparse attentions are measured while
    they run op by op: `Report.sparse_quality`. Raises OptionsError for bad options before anything runs.
    """
    if not callable(model):
        raise TypeError(
            f"explain: model = {model!r} cannot be called; pass an nn.Module or a function, then its inputs"
        )
    parsed = parse_options(options)
    if parsed.inner == "auto":
        parsed = parsed.model_copy(update={"inner": "eager", "mode": "default", "inner_options": {}})
    args, kwargs = _copied(args, kwargs)
    parts: list[Report] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        return compile_graph(gm, example_inputs, parsed, parts.append, watch=_watching)

    with (
        _restored_buffers(model),
        _restored_random_state(),
        torch._dynamo.config.patch(DYNAMO_SETTINGS),
        torch._functorch.config.patch(_AOT_SETTINGS),
    ):
        try:
            _compile(_private(model), backend)(*args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, OptionsError):
                raise failure.inner_exception from None
            raise
    return merge(parts)


def _watching(part: GraphModule, report: Report, compiled: Callable) -> Callable:
    """What runs the graph and notes what only values say; an inner compiler runs its own code, which nobody sees."""
    if report.inner != "eager" or report.trace is None:
        return compiled
    seen = {**mask_watchers(part.graph, report.trace), **packed_watchers(part.graph, report.trace)}
    watchers = {**seen, **sparse_watchers(part.graph, report)}
    return watched(part, watchers) if watchers else compiled


def _private(fn: Callable) -> Callable:
    """A caller of `fn` with a code object of its own: what Dynamo caches on it goes when it goes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def _compile(fn: Callable, backend: Callable) -> Callable:
    """Frames behind graph breaks are cached on the model's code: apart from the user's, where torch can."""
    isolated: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        isolated["isolate_recompiles"] = True
    return torch.compile(fn, backend=backend, **isolated)


def _copied(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Copies of the arguments, for a call may write to them, as to a KV cache. Fake tensors hold no data."""
    if detect_fake_mode((args, kwargs)) is not None:
        return args, kwargs
    try:
        return copy.deepcopy((args, kwargs))
    except Exception as error:
        warnings.warn(
            f"sgl_npu.explain: the arguments cannot be copied ({error}); the call runs on the originals "
            "and may change them. Pass detached tensors and fresh caches to be safe",
            stacklevel=3,
        )
        return args, kwargs


@contextlib.contextmanager
def _restored_buffers(model: Any) -> Iterator[None]:
    """Put back the buffers of a module that the body replaces or writes to."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    held = [
        (module._buffers, name, buffer, buffer.detach().clone(), buffer._version)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for buffers, name, buffer, value, version in held:
            buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


@contextlib.contextmanager
def _restored_random_state() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
