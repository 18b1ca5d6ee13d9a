"""Run a callable by replaying graphs that were captured of it, one for each bucket of batch and tokens."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sgl_npu.runtime.capture.bucket_graph import BucketGraph, Shaping, Step
from sgl_npu.runtime.capture.buckets import (
    Bucket,
    Declared,
    Refusal,
    bucket_of,
    check_axes,
    check_names,
    check_pad,
    check_paths,
    checked_buckets,
    checked_dims,
    real_size,
    widened,
)
from sgl_npu.runtime.capture.captured_graph import NotCapturable
from sgl_npu.runtime.capture.driver import DRIVERS, Driver
from sgl_npu.runtime.capture.signature import REQUIRES_GRAD, Lengths, Unkeyed, graph_key, read
from sgl_npu.runtime.capture.statistics import GraphMemory, Statistics
from sgl_npu.runtime.capture.structure import flatten, is_host_list, list_name

Key = tuple[Any, ...]
OUTPUTS, ON_ERROR = ("copy", "view"), ("raise", "eager")
CAPTURE_FAILED = "the bucket could not be captured"
EXAMPLES = {
    "dims": "{'input_ids': ('batch', 'tokens')}",
    "pad": "{'slots': -1}",
    "lengths": "{'seq_lens': 'actual_seq_lengths_kv'}",
}
STEPS = 4096  # kinds of calls whose copies are kept ready


class CaptureError(RuntimeError):
    """A bucket could not be captured: the message names it, the cause and the remedy."""


class GraphRunner:
    """A callable that runs `fn` by replaying graphs captured of it on an NPU or a GPU, for inference.

    A call is padded to the smallest bucket that holds it. Every tensor among its inputs is copied into the graph's own
    memory, in every call; what the graph returns is cut back to the size of the call. A graph is captured when its
    bucket is first needed, or ahead by `capture`. Calls that no graph can stand for run `fn` as it is: `statistics`
    counts them.

    fn: a function or module, compiled or not. Its tensors may be of any dtype, in nested lists, tuples, dicts and
        classes that torch.utils._pytree knows; all on one device. It is called with inputs by name.
    buckets: sizes to capture, (batch, tokens), or the batch alone for one token each.
    dims: which dimensions of an input are "batch" and "tokens", None for one that is neither; more that follow need no
        name. By the input's name, "name.key.0" for what stands within it. Inputs without an entry keep their sizes.
    output_dims: the same for the outputs; a tuple is for all of them, a dict by path ("logits", "0") for some.
    pad: what stands in the rows that a call lacks, by input; 0 where nothing is said.
    lengths: inputs that are lists of ints on the host, and what operators call them, for lists that a replay on an NPU
        brings up to date. Those that have the operator's own name ("actual_seq_lengths_kv") need no entry.
    outputs: "copy", or "view" for memory that the next replay of any graph of this runner writes over.
    max_graphs: how many graphs are kept; the one that was not used for longest is freed.
    warmup: how often fn runs before it is captured, on a side stream.
    on_error: "raise" a CaptureError when a bucket cannot be captured, or run it "eager" from then on, with a warning.
    driver: for a device that this package has no graphs for.

    Raises ValueError for settings that make no sense, CaptureError (from a call) where a bucket cannot be captured.
    Not for several threads or streams at once. See docs/capture.md.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        buckets: Iterable[tuple[int, int] | int],
        dims: Mapping[str, tuple[str | None, ...]],
        output_dims: tuple[str | None, ...] | Mapping[str, tuple[str | None, ...]],
        pad: Mapping[str, float] | None = None,
        lengths: Mapping[str, str] | None = None,
        outputs: Literal["copy", "view"] = "copy",
        max_graphs: int = 64,
        warmup: int = 3,
        on_error: Literal["raise", "eager"] = "raise",
        driver: Driver | None = None,
    ) -> None:
        if not callable(fn):
            raise ValueError(f"fn = {fn!r}: give a function or a module")
        for option, setting in (("dims", dims), ("pad", pad or {}), ("lengths", lengths or {})):
            if not isinstance(setting, Mapping):
                raise ValueError(f"{option} = {setting!r}: give a dict by the input's name, such as {EXAMPLES[option]}")
        self.buckets = checked_buckets(buckets)
        by_input = checked_dims(dims, "dims")
        check_axes(self.buckets, by_input)
        self._positional, keywords = _parameters(fn)
        if keywords is not None:
            for option, paths in {"dims": by_input, "pad": pad or {}, "lengths": lengths or {}}.items():
                check_names(paths, keywords, option)
        for option, value, choices in (("outputs", outputs, OUTPUTS), ("on_error", on_error, ON_ERROR)):
            if value not in choices:
                raise ValueError(f"{option} = {value!r}: choose {choices[0]!r} or {choices[1]!r}")
        for option, number in (("max_graphs", max_graphs), ("warmup", warmup)):
            if type(number) is not int or number < 1:
                raise ValueError(f"{option} = {number!r}: give an int from 1 on")
        self.statistics = Statistics()
        self._fn, self._lengths = fn, dict(lengths or {})
        self._dims, self._pad = Declared(by_input, ()), Declared(dict(pad or {}), 0)
        self._output_dims = Declared(checked_dims(output_dims, "output_dims"), ())
        self._copy, self._eager_on_error = outputs == "copy", on_error == "eager"
        self._max_graphs, self._warmup = max_graphs, warmup
        self._graphs: dict[Key, BucketGraph] = {}
        self._steps: dict[Key, Step] = {}  # by the same for a call's own sizes
        self._failures: dict[Key, str] = {}
        self._driver: Driver | None = None
        if driver is not None:
            self._use(driver)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What fn gives for these inputs, by a graph where there can be one."""
        inputs = self._by_name(args, kwargs) if args else kwargs
        tensors: list[Tensor] = []
        lists: list[list[int]] = []
        try:
            key = self._key(inputs, tensors, lists)
            step = self._steps.get(key) or self._prepared(key, inputs)
        except Unkeyed as unkeyed:
            refusal = unkeyed.refusal
        else:
            self.statistics.replays += 1
            step.graph.last_replay = self.statistics.replays
            return step.run(tensors, lists)
        return self._eager(inputs, refusal)

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Capture every bucket now, the largest first, so that others use the memory of the first.

        The inputs are an example of a call, of any size: cut or padded they are what the graphs are warmed up with.
        Raises ValueError where fewer graphs are kept than there are buckets, CaptureError for inputs that no graph can
        stand for, or as a call does.
        """
        if len(self.buckets) > self._max_graphs:
            raise ValueError(f"max_graphs = {self._max_graphs}: at least {len(self.buckets)}, one for each bucket")
        inputs = self._by_name(args, kwargs) if args else kwargs
        try:
            key = self._key(inputs, [], [])
            leaves, size = self._measured(inputs)
        except Unkeyed as unkeyed:
            raise CaptureError(f"GraphRunner.capture: {unkeyed}") from None
        for bucket in reversed(self.buckets):
            own = self._graph_key(key, leaves, bucket)
            if own not in self._graphs:
                with contextlib.suppress(Unkeyed):  # with on_error="eager", which has warned
                    self._captured(own, inputs, size, bucket)

    def memory(self) -> GraphMemory:
        """What the graphs hold now, in bytes."""
        buckets: dict[Bucket, int] = {}
        for graph in self._graphs.values():
            buckets[graph.bucket] = buckets.get(graph.bucket, 0) + graph.bytes
        return GraphMemory(None if self._driver is None else self._driver.pool_bytes(), buckets)

    def clear(self) -> None:
        """Free all graphs; later calls capture anew, also what could not be captured before."""
        self._steps.clear()
        self._failures.clear()
        while self._graphs:
            self._graphs.popitem()[1].free()

    def _use(self, driver: Driver) -> None:
        self._driver, self._device_type = driver, driver.device.type
        keys = driver.update_keys
        for name, key in self._lengths.items():
            if keys and key not in keys:
                raise ValueError(
                    f"lengths[{name!r}] = {key!r}: no operator takes a list of that name from a replay; they take "
                    f"{', '.join(sorted(keys))}"
                )
        self._updated = {key: key for key in keys} | (self._lengths if keys else {})
        self._shaping = Shaping(self._dims, self._output_dims, self._pad, self._updated)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self._positional
        if len(args) > len(names):
            raise TypeError(
                f"{len(args)} inputs by position, but the callable names {len(names)} ({', '.join(names) or 'none'}): "
                "pass the others by name, or wrap a callable that takes none by name in a function that names them"
            )
        inputs = dict(zip(names, args, strict=False))
        if twice := inputs.keys() & kwargs.keys():
            raise TypeError(f"given by position and by name: {', '.join(sorted(twice))}")
        return inputs | kwargs

    def _key(self, inputs: dict[str, Any], tensors: list[Tensor], lists: list[list[int]]) -> Key:
        if self._driver is None:
            self._use(_driver_for(inputs))
        autocast = torch.get_autocast_dtype(self._device_type) if torch.is_autocast_enabled(self._device_type) else None
        return read(inputs, self._updated, autocast, torch.is_grad_enabled(), tensors, lists)

    def _prepared(self, key: Key, inputs: dict[str, Any]) -> Step:
        """What such a call does, from now on, with a graph that may be captured first. Raises Unkeyed."""
        leaves, size = self._measured(inputs)
        bucket = bucket_of(size, self.buckets)
        if isinstance(bucket, Refusal):
            raise Unkeyed(bucket)
        own = self._graph_key(key, leaves, bucket)
        if own in self._failures:
            raise Unkeyed(Refusal(CAPTURE_FAILED, self._failures[own]))
        graph = self._graphs.get(own) or self._captured(own, inputs, size, bucket)
        if len(self._steps) >= STEPS:
            self._steps.clear()
        step = self._steps[key] = graph.step(size, self._copy)
        return step

    def _measured(self, inputs: dict[str, Any]) -> tuple[list[tuple[str, Any]], Bucket]:
        assert self._driver is not None
        leaves, _ = flatten(dict(sorted(inputs.items())))
        for path, leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device != self._driver.device:
                reason = f"{path} is on {leaf.device}, and the graphs are on {self._driver.device}: move it there"
                raise Unkeyed(Refusal("an input is on another device", reason))
        for option, entries in (("dims", self._dims.entries), ("pad", self._pad.entries)):
            check_paths(entries, [path for path, _ in leaves], option)
        for path, leaf in leaves:
            if isinstance(leaf, Tensor):
                check_pad(path, self._pad.of(path), leaf.dtype)
        size = real_size(leaves, self._dims)
        if isinstance(size, Refusal):
            raise Unkeyed(size)
        return leaves, size

    def _graph_key(self, key: Key, leaves: list[tuple[str, Any]], bucket: Bucket) -> Key:
        shapes = (torch.Size(widened(x, self._dims.of(path), bucket)) for path, x in leaves if isinstance(x, Tensor))
        lists = (
            Lengths(widened(x, self._dims.of(path), bucket))
            if list_name(path) in self._updated
            else Lengths(self._shaping.fitted(path, x, bucket))
            for path, x in leaves
            if is_host_list(x)
        )
        return graph_key(key, shapes, lists)

    def _captured(self, own: Key, inputs: dict[str, Any], size: Bucket, bucket: Bucket) -> BucketGraph:
        """A new graph, in place of the one that was not used for longest. Raises CaptureError, or Unkeyed instead."""
        assert self._driver is not None
        while len(self._graphs) >= self._max_graphs:
            self._evict()
        inputs = dict(sorted(inputs.items()))
        run = _Runs(self._fn)
        try:
            with torch.no_grad(), _autocast_without_cache(self._device_type):
                graph = BucketGraph(run, inputs, size, bucket, self._shaping, self._driver, self._warmup)
        except Exception as error:
            message = _explained(error, bucket, warming_up=run.inside and run.number <= self._warmup)
            if not self._eager_on_error:
                raise CaptureError(message) from error
            warnings.warn(f"sgl_npu: {message}; such calls run eagerly from now on", stacklevel=4)
            while len(self._failures) >= self._max_graphs:
                del self._failures[next(iter(self._failures))]
            self._failures[own] = message
            raise Unkeyed(Refusal(CAPTURE_FAILED, message)) from error
        graph.last_replay = self.statistics.replays
        self._graphs[own] = graph
        self.statistics.captures += 1
        return graph

    def _evict(self) -> None:
        key = min(self._graphs, key=lambda key: self._graphs[key].last_replay)
        graph = self._graphs.pop(key)
        self._steps = {call: step for call, step in self._steps.items() if step.graph is not graph}
        graph.free()
        self.statistics.evictions += 1
        if self.statistics.evictions == self._max_graphs:
            warnings.warn(
                f"sgl_npu: GraphRunner has freed as many graphs as it keeps, max_graphs = {self._max_graphs}, to "
                "capture others; raise it, or pass numbers and lists that change from call to call as tensors",
                stacklevel=5,
            )

    def _eager(self, inputs: dict[str, Any], refusal: Refusal) -> Any:
        self.statistics.eager[refusal.rule] += 1
        self.statistics.last_eager_reason = refusal.reason
        with torch.set_grad_enabled(torch.is_grad_enabled() and refusal.rule == REQUIRES_GRAD):
            return self._fn(**inputs)


def _parameters(fn: Callable[..., Any]) -> tuple[list[str], list[str] | None]:
    """Names that inputs by position have, and all that inputs by name may have; None for any."""
    inner = getattr(fn, "_orig_mod", fn)  # of torch.compile, whose own forward takes anything
    try:
        signature = inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner)
    except (TypeError, ValueError):
        return [], None
    parameters = signature.parameters.values()
    by_position = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    if any(x.kind is x.VAR_KEYWORD for x in parameters):
        return by_position, None
    return by_position, by_position + [x.name for x in parameters if x.kind is x.KEYWORD_ONLY]


def _driver_for(inputs: dict[str, Any]) -> Driver:
    """The graphs of the device that the first tensor on such a device is on. Raises Unkeyed."""
    for _, leaf in flatten(inputs)[0]:
        if isinstance(leaf, Tensor) and leaf.device.type in DRIVERS:
            return DRIVERS[leaf.device.type](leaf.device)
    reason = f"no input is on a device that has graphs: {', '.join(DRIVERS)}"
    raise Unkeyed(Refusal("no device that has graphs", reason))


def _autocast_without_cache(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The caller's autocast. Its cache of weights is freed when it ends, and a graph would read from it."""
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


class _Runs:
    """A callable of inputs by name. number: of runs so far; inside: whether the last was left by an error."""

    number, inside = 0, False

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def __call__(self, given: dict[str, Any]) -> Any:
        self.number, self.inside = self.number + 1, True
        result = self._fn(**given)
        self.inside = False
        return result


def _explained(error: Exception, bucket: Bucket, warming_up: bool) -> str:
    said = f"GraphRunner could not capture the bucket of {bucket}: "
    if isinstance(error, NotCapturable):
        return said + str(error)
    said += f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}. "
    if isinstance(error, torch.OutOfMemoryError):
        return said + "Give fewer or smaller buckets, or a lower max_graphs"
    if warming_up:
        return said + "The callable raised it before anything was captured, with inputs of the bucket's size"
    return said + (
        "A graph repeats the same kernels on the same memory, so the callable must not read a tensor's value on the "
        "host (.item(), .cpu(), a condition), nor wait for the device; change that, leave the bucket out of `buckets`, "
        "or pass on_error='eager'"
    )
