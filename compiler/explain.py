"""`explain`: what the backend would do with a call, found out by compiling and running it once on the side."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensor
from torch.fx.graph_module import GraphModule
from torch.utils import _pytree as pytree

from sgl_npu.compiler.backend import compile_graph
from sgl_npu.compiler.options import Options, OptionsError, parse_options
from sgl_npu.compiler.report import Report, merge

# One call may reach any number of graphs, and the same model may be explained any number of times. Shapes are those of
# the call, not generalised from what other calls have seen.
_DYNAMO_SETTINGS = {
    "recompile_limit": 1 << 30,
    "accumulated_recompile_limit": 1 << 30,
    "automatic_dynamic_shapes": False,
}


def explain(
    model: Callable,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> Report:
    """Compile `model` for `model(*args, **kwargs)`, run it once, and report every graph that the call reached.

    Needs no NPU: with `options={"platform": "npu"}` CPU tensors run on emulated NPU ops. The inner compiler is "eager"
    unless the options name one. What the caller holds stays as it is: arguments are copied before they are used,
    buffers and random state are put back, other compiled models stay compiled, `reports()` does not grow. Raises
    OptionsError for bad options before anything runs.
    """
    parsed = parse_options(options)
    if parsed.inner == "auto":
        parsed = parsed.model_copy(update={"inner": "eager"})
    args, kwargs = _copied(args, kwargs)
    parts: list[Report] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        return compile_graph(gm, example_inputs, parsed, parts.append)

    with (
        _restored_buffers(model),
        _restored_random_state(),
        torch._dynamo.config.patch(_DYNAMO_SETTINGS),
    ):
        try:
            torch.compile(_private(model), backend=backend, **_isolation())(*args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, OptionsError):
                raise failure.inner_exception from None
            raise
    return merge(parts)


def _private(fn: Callable) -> Callable:
    """A caller of `fn` with a code object of its own: what Dynamo caches on it goes when it goes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def _isolation() -> dict[str, bool]:
    """Frames behind graph breaks are cached on the model's own code: apart from the user's entries, where torch can."""
    known = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if known else {}


def _copied(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Copies of the arguments: a call may write to them, as it does to a KV cache. Fake tensors hold nothing to keep."""
    if any(isinstance(x, FakeTensor) for x in pytree.tree_leaves((args, kwargs))):
        return args, kwargs
    try:
        return copy.deepcopy((args, kwargs))
    except Exception as error:
        warnings.warn(
            f"sgl_npu.explain: the arguments cannot be copied ({error}); the call runs on the originals and may change "
            "them. Pass detached tensors and fresh caches to be safe",
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
