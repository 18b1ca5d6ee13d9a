"""Ascend's compilers as inner compilers: npugraph_ex captures an ACL graph, torchair converts to a GE graph.

Both are part of torch_npu and take a graph that is past AOTAutograd. The names used here, as they are in torch_npu
2.13.0: `get_compiler` and `CompilerConfig` are public; the decompositions that belong to them are read off what the
public `get_npu_backend` returns, which also applies their patches to torch; `_torchair_is_parameter` and
`_fixed_attrs` are private.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import default_partition
from torch._functorch import config as functorch_config
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import get_static_input_idxs
from torch._inductor.utils import num_fw_fixed_arguments
from torch.fx.graph_module import GraphModule

from sgl_npu.compiler import ge_converters
from sgl_npu.compiler.ge_decompositions import ge_decompositions
from sgl_npu.compiler.npugraph_ex_exchange import flat_exchange
from sgl_npu.compiler.options import Options, OptionsError, refuse_mode
from sgl_npu.passes.extrema import choose_extrema
from sgl_npu.passes.hoist import hoist_lengths, hoist_reads
from sgl_npu.passes.merge_projections import joined_inputs
from sgl_npu.passes.overlap import separate_operands
from sgl_npu.runtime.attention import attention, attention_backward
from sgl_npu.runtime.packed_attention import packed_attention

_CANONICAL = (attention, attention_backward, packed_attention)
_PLACES = {"npugraph_ex": "torch_npu.dynamo.npugraph_ex", "torchair": "torch_npu.dynamo.torchair"}


def is_installed(name: str) -> bool:
    """Whether torch_npu is there with the compiler `name`; imports the packages above it."""
    try:
        return importlib.util.find_spec(_PLACES[name]) is not None
    except (ImportError, RuntimeError):
        return False


@dataclass(frozen=True)
class Compilation:
    """What an Ascend compiler made of a graph."""

    compiler: str
    compiled: Any


_recorded: list[Compilation] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Compilation]]:
    """A list that grows by every compilation in the body."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


class _Ascend:
    """One compilation of one Dynamo graph."""

    name: str

    def __init__(self, dynamo_graph: GraphModule, options: Options) -> None:
        refuse_mode(options, self.name)
        self.package = _imported(self.name)
        self.config = _configured(self.package.CompilerConfig(), options.inner_options, self.name)
        self.table = _decompositions(self.package, self.config, self.name)
        self.dynamo_inputs = len(dynamo_graph.graph.find_nodes(op="placeholder"))

    def decompositions(self) -> Mapping[Any, Callable]:
        return self.table

    def context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def partition(self, joint: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        return default_partition(joint, inputs, **kwargs)

    def forward(self, gm: GraphModule, inputs: Sequence[Any], is_inference: bool) -> Callable:
        return self._with_lengths(gm, inputs, hoist_reads)

    def _with_lengths(self, gm: GraphModule, inputs: Sequence[Any], *hoists: Callable) -> Callable:
        """Compile the graph with the lengths that it gets from outside as inputs of their own."""
        functions = [function for hoist in hoists if (function := hoist(gm)) is not None]
        if not functions:
            return self._compile(gm, inputs)
        added = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")][len(inputs) :]
        compiled = self._compile(gm, [*inputs, *added])

        def run(*args: Any) -> Any:
            for function in functions:
                args = (*args, *function(*args))
            return compiled(*args)

        return run

    def backward(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        return self._compile(gm, inputs)

    def _compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        refuse_canonical_nodes(gm, self.name)
        # A backward is compiled when it first runs, outside of the mode in which ops that make tensors make fake ones.
        with detect_fake_mode(inputs) or contextlib.nullcontext():
            compiled = self.package.get_compiler(self.config)(gm, inputs)
        if _recorded is not None:
            _recorded.append(Compilation(self.name, compiled))
        return compiled


class NpugraphEx(_Ascend):
    """Captures the graph once per shape and replays it; lengths of fused ops are updated without a new capture."""

    name = "npugraph_ex"

    def __init__(self, dynamo_graph: GraphModule, options: Options) -> None:
        super().__init__(dynamo_graph, options)
        asked = self.config.post_grad_custom_post_pass.value
        self.config.post_grad_custom_post_pass = _then_separate(asked) if asked else _separate

    def decompositions(self) -> Mapping[Any, Callable]:
        return flat_exchange(self.table)

    def _compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        return _first_call_unchecked(super()._compile(gm, inputs))

    def forward(self, gm: GraphModule, inputs: Sequence[Any], is_inference: bool) -> Callable:
        # Parameters stay where they are in memory: npugraph_ex need not copy them before a replay.
        for index in get_static_input_idxs(num_fw_fixed_arguments(self.dynamo_inputs, len(inputs))):
            if isinstance(inputs[index], torch.Tensor):
                inputs[index]._torchair_is_parameter = True
        for node, _ in joined_inputs(gm.graph):
            node.meta["val"]._torchair_is_parameter = True
        return self._with_lengths(gm, inputs, hoist_reads, hoist_lengths)


def _first_call_unchecked(compiled: Callable) -> Callable:
    """`compiled`, with torch's check of its first call reduced to a warning.

    torch checks that no custom op returns one of its inputs, and raises where the environment variable CI is set.
    npugraph_ex calls ops that do, as `npu_fused_infer_attention_score.out`: the schema (torch_npu 2.13.0) does not say
    that it returns what it was given to write to. The setting is private; seen in torch 2.13.
    """
    settings = {"error_on_custom_op_aliasing": False}
    calls = itertools.count()

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        if next(calls) or not hasattr(functorch_config, "error_on_custom_op_aliasing"):
            return compiled(*args)
        with functorch_config.patch(settings):
            return compiled(*args)

    return run


def _separate(gm: GraphModule, *_: Any) -> None:
    separate_operands(gm.graph)


def _then_separate(first: Callable) -> Callable:
    """The user's own last pass, then ours: what the user's pass writes is told apart too."""

    def both(gm: GraphModule, *others: Any) -> None:
        first(gm, *others)
        separate_operands(gm.graph)

    return both


class Torchair(_Ascend):
    """Hands the graph to GE, Ascend's graph engine, which compiles it as a whole with its symbolic shapes."""

    name = "torchair"

    def __init__(self, dynamo_graph: GraphModule, options: Options) -> None:
        super().__init__(dynamo_graph, options)
        ge_converters.register()

    def decompositions(self) -> Mapping[Any, Callable]:
        return {**ge_decompositions(), **self.table}

    def _compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        choose_extrema(gm.graph)
        return super()._compile(gm, inputs)


def refuse_canonical_nodes(gm: GraphModule, name: str) -> None:
    """Raise RuntimeError if an attention was not lowered: no compiler knows the canonical ops."""
    nodes = [node for part in gm.modules() if isinstance(part, GraphModule) for node in part.graph.nodes]
    left = [f"{node.name} ({node.target})" for node in nodes if node.target in _CANONICAL]
    if left:
        raise RuntimeError(
            f"sgl_npu: internal error: {', '.join(left)} reached {name} without having been lowered to an op that it "
            "knows; please report it with the output of sgl_npu.explain; until then use inner = 'eager'"
        )


def _imported(name: str) -> Any:
    if not is_installed(name):
        raise OptionsError(
            f"inner = {name!r}: {name} is part of torch_npu, which is not installed (or is older than {name}); "
            "pip install torch-npu in the version of your torch, or use inner = 'eager'"
        )
    importlib.import_module("torch_npu")
    return importlib.import_module(name)


def _configured(config: Any, inner_options: Mapping[str, Any], name: str) -> Any:
    """The compiler's own CompilerConfig with the user's settings, each named by its path: "debug.graph_dump.type"."""
    for path, value in inner_options.items():
        *groups, setting = path.split(".")
        owner = config
        for depth, part in enumerate(groups):
            if part not in _settings(owner) or not _settings(getattr(owner, part)):
                raise _unknown(path, groups[:depth], part, _settings(owner), name)
            owner = getattr(owner, part)
        if path == "mode":
            raise OptionsError(f"inner_options: mode = {value!r}: inner = {name!r} has chosen it; leave mode out")
        if setting not in _settings(owner):
            raise _unknown(path, groups, setting, _settings(owner), name)
        if inside := _settings(getattr(owner, setting)):
            raise OptionsError(
                f"inner_options: {path} = {value!r}: {path} of {name}.CompilerConfig is a group of settings; "
                f"name one of them: {', '.join(f'{path}.{x}' for x in inside)}"
            )
        try:
            setattr(owner, setting, value)
        except (ValueError, TypeError, OSError) as error:
            rule = str(error).partition("Traceback (most recent call last)")[0].strip()  # torch_npu appends one
            raise OptionsError(f"inner_options: {path} = {value!r}: {name}.CompilerConfig says: {rule}") from error
    return config


def _unknown(path: str, groups: Sequence[str], wrong: str, known: Sequence[str], name: str) -> OptionsError:
    close = difflib.get_close_matches(wrong, [x for x in known if not x.startswith("_")], n=1)
    paths = [".".join([*groups, x]) for x in close or known if not x.startswith("_")]
    hint = f"did you mean {paths[0]!r}?" if close else f"known are {', '.join(paths)}"
    return OptionsError(f"inner_options: {path!r} is not a setting of {name}.CompilerConfig; {hint}")


def _settings(owner: Any) -> list[str]:
    """The names that a group of a CompilerConfig lets one set; none of what is not a group."""
    return [name for name in dict.fromkeys(getattr(owner, "_fixed_attrs", ())) if name != "mode"]


def _decompositions(package: Any, config: Any, name: str) -> dict[Any, Callable]:
    try:
        return dict(package.get_npu_backend(compiler_config=config).keywords["decompositions"])
    except RuntimeError as error:
        if "override a python impl" not in str(error):
            raise
        raise OptionsError(
            f"inner = {name!r}: this process has compiled with Ascend's other compiler, and torch_npu allows one of "
            "npugraph_ex and torchair in a process; use the same inner everywhere, or another process"
        ) from error
