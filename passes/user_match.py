"""Attention that only its user can name, as an op of a vendor or a library, becomes the canonical op.

before: out = mylib::flash_attn(q, k, v)      and a matcher that says what this is: AttentionPattern(q, k, v, ...)
after:  sgl_npu::attention(q, k, v, ...) → views

A matcher is asked about every op of a graph for inference. What it says is checked: nothing is taken on trust but the
meaning of the op itself.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import ShortenTraceback
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.inline import conform, trace_before
from sgl_npu.passes.site import SiteRecord, mark_site, new_record, record_of
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import Size, known

# By the letters of their dimensions, slowest first: those of query, key and value, and those of an output.
_OPERANDS = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3)}
LAYOUTS = tuple(_OPERANDS)
OUTPUTS = (*LAYOUTS, "BSH")


@dataclass(frozen=True)
class AttentionPattern:
    """What the value of a node is: softmax(softcap(scale * query · key) + bias, where allowed) · value.

    `query` (B, Hq, Sq, D), `key` (B, Hkv, Skv, D) and `value` (B, Hkv, Skv, Dv) are nodes of the graph, or with
    `layout="BSND"` their transposes (B, S, H, D). Hq is a multiple of Hkv, all three have one floating dtype.
    The node is (B, Hq, Sq, Dv), with `output="BSND"` (B, Sq, Hq, Dv), with `output="BSH"` (B, Sq, Hq * Dv); `output`
    is `layout` unless it is given.

    `mask` is bool, True = may be attended; `bias` is added to the scores; both broadcast to (B, Hq, Sq, Skv). `sinks`
    is (Hq,). `lower` and `upper`, numbers or nodes of sizes, bound j - i, key index minus query index: `upper=0` is
    causal from the top left. `scale` is D ** -0.5 unless it is given; softcap 0 is none.

    Raises TypeError or ValueError for what is none of that.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    bias: fx.Node | None = None
    sinks: fx.Node | None = None
    scale: float | None = None
    softcap: float = 0.0
    lower: int | fx.Node | None = None
    upper: int | fx.Node | None = None
    layout: str = "BNSD"
    output: str | None = None

    def __post_init__(self) -> None:
        for name in _TENSORS:
            value = getattr(self, name)
            if not isinstance(value, fx.Node) and (name in _REQUIRED or value is not None):
                raise TypeError(f"AttentionPattern: {name} = {value!r} should be a node of the graph")
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) and not (name == "scale" and value is None):
                raise TypeError(f"AttentionPattern: {name} = {value!r} should be a number known while compiling")
        for name in _BOUNDS:
            if not isinstance(getattr(self, name), (int, fx.Node, type(None))):
                raise TypeError(f"AttentionPattern: {name} = {getattr(self, name)!r} should be an int or a node")
        if self.layout not in LAYOUTS or self.output not in (None, *OUTPUTS):
            raise ValueError(
                f"AttentionPattern: layout = {self.layout!r}, output = {self.output!r}: "
                f"should be of {', '.join(LAYOUTS)}, and for the output also BSH"
            )

    def nodes(self) -> dict[str, fx.Node]:
        """Every node among the fields, by name."""
        return {x.name: value for x in fields(self) if isinstance(value := getattr(self, x.name), fx.Node)}


_REQUIRED = ("query", "key", "value")
_TENSORS = (*_REQUIRED, "mask", "bias", "sinks")
_BOUNDS = ("lower", "upper")

MatcherFunction = Callable[[fx.Node], AttentionPattern | None]


class MatcherError(ShortenTraceback, TypeError):
    """A matcher returned something that is neither a pattern nor None."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class Matcher:
    """A registered matcher: called like the function, taken back by `remove()` or at the end of a `with`."""

    def __init__(self, function: MatcherFunction) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, node: fx.Node) -> AttentionPattern | None:
        return self.function(node)

    def remove(self) -> None:
        """Ask this matcher no more. What is compiled stays as it is."""
        with _lock:
            if self in _matchers:
                _matchers.remove(self)

    def __enter__(self) -> Matcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_lock = threading.Lock()
_matchers: list[Matcher] = []


def register_matcher(function: MatcherFunction) -> Matcher:
    """Ask `function` about every op of each graph that is compiled from now on; usable as a decorator.

    `function(node)` gets a call of the functional ATen graph, before anything else is matched, and returns an
    AttentionPattern that says what the node's value is, or None. It must not change the graph. Where several are
    registered the first that answers counts. Raises TypeError for what cannot be called.
    """
    if not callable(function):
        raise TypeError(f"register_matcher: {function!r} cannot be called; pass a function of a node")
    matcher = Matcher(function)
    with _lock:
        _matchers.append(matcher)
    return matcher


def match_all(gm: GraphModule, records: dict[int, SiteRecord], decompositions: Any, strict: bool) -> None:
    """Ask every matcher about every op, and put the canonical op in the place of what is recognised."""
    with _lock:
        asked = list(_matchers)
    seen: dict = {}
    for node in [node for node in gm.graph.nodes if node.op == "call_function"] if asked else []:
        for matcher, pattern in _answers(node, asked, strict):
            record = record_of(node, records) or new_record(node, f"matcher {matcher.name}", records)
            reason = _refuse(pattern, node)
            record.refusals = [] if reason is None else [("user_match", reason)]
            if reason is None:
                _rewrite(gm, node, pattern, record, decompositions, seen)
            break
    gm.graph.eliminate_dead_code()


def _answers(node: fx.Node, asked: list[Matcher], strict: bool) -> Iterator[tuple[Matcher, AttentionPattern]]:
    """What matchers say of a node. One that raises is not asked again in this graph."""
    for matcher in list(asked):
        try:
            answer = matcher(node)
        except Exception as error:
            if strict:
                raise
            asked.remove(matcher)
            warnings.warn(f"sgl_npu: matcher {matcher.name!r} failed on {node.format_node()}: {error!r}", stacklevel=2)
            continue
        if answer is not None and not isinstance(answer, AttentionPattern):
            raise MatcherError(
                f"matcher {matcher.name!r} returned {answer!r} for {node.name!r}; it should return a "
                "sgl_npu.AttentionPattern, or None for a node it does not know"
            )
        if answer is not None:
            yield matcher, answer


def _refuse(pattern: AttentionPattern, node: fx.Node) -> str | None:
    """The first rule that a pattern breaks, or None."""
    for name, x in pattern.nodes().items():
        if x.graph is not node.graph or not x < node:
            return f"{name} = {x.name!r} does not come before {node.name!r} in its graph"
        wanted: Any = torch.SymInt if name in _BOUNDS else Tensor
        if not isinstance(x.meta.get("val"), wanted):
            return f"{name} = {x.name!r} is no {'size' if name in _BOUNDS else 'tensor'}"
    if not isinstance(node.meta.get("val"), Tensor):
        return f"{node.name!r} is no tensor; of an op with several results, match the getitem"
    tensors = {name: x.meta["val"] for name, x in pattern.nodes().items() if name in _TENSORS}
    for name in _REQUIRED:
        if tensors[name].dim() != 4:
            return f"{name} has {tensors[name].dim()} dimensions, not the four of {pattern.layout}"
    return _refuse_shapes(pattern, tensors, node.meta["val"])


def _refuse_shapes(pattern: AttentionPattern, tensors: dict[str, Tensor], out: Tensor) -> str | None:
    order = _OPERANDS[pattern.layout]
    query, key, value = (tuple(tensors[name].shape[dim] for dim in order) for name in _REQUIRED)
    for name, one, other in (
        ("B of query and key", query[0], key[0]),
        ("B of key and value", key[0], value[0]),
        ("H of key and value", key[1], value[1]),
        ("S of key and value", key[2], value[2]),
        ("D of query and key", query[3], key[3]),
    ):
        if not known(one == other):
            return f"{name}: {one} and {other} are not known to be equal"
    if not known(query[1] % key[1] == 0):
        return f"{query[1]} query heads are no multiple of {key[1]} key heads"
    dtypes = [tensors[name].dtype for name in _REQUIRED]
    if len(set(dtypes)) != 1 or not dtypes[0].is_floating_point or torch.finfo(dtypes[0]).bits < 16:
        return (
            f"query, key and value are {', '.join(map(str, dtypes))}: should be one floating dtype of 16 bits or more"
        )
    if any(x.device != out.device for x in tensors.values()):
        return "its tensors are on several devices"
    full = (*query[:3], key[2])
    for name in ("mask", "bias"):
        if name in tensors and not _broadcasts(tensors[name].shape, full):
            return f"{name} {_text(tensors[name].shape)} does not broadcast to {_text(full)}"
    if "mask" in tensors and tensors["mask"].dtype != torch.bool:
        return f"mask is {tensors['mask'].dtype}: should be torch.bool, True = may be attended"
    if "bias" in tensors and not tensors["bias"].is_floating_point():
        return f"bias is {tensors['bias'].dtype}: should be floating"
    if "sinks" in tensors and not _same(tensors["sinks"].shape, query[1:2]):
        return f"sinks {_text(tensors['sinks'].shape)} is not one number for each of {query[1]} heads"
    wanted = _output_shape(pattern, (*query[:3], value[3]))
    if not _same(out.shape, wanted) or not out.is_floating_point():
        return f"the node is {out.dtype} {_text(out.shape)}, the attention's output is {_text(wanted)}"
    return None


def _output_shape(pattern: AttentionPattern, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    batch, heads, rows, columns = shape
    shapes = {"BNSD": shape, "BSND": (batch, rows, heads, columns), "BSH": (batch, rows, heads * columns)}
    return shapes[pattern.output or pattern.layout]


def _rewrite(
    gm: GraphModule,
    node: fx.Node,
    pattern: AttentionPattern,
    record: SiteRecord,
    decompositions: Any,
    seen: dict,
) -> None:
    nodes = pattern.nodes()
    order = _OPERANDS[pattern.layout]
    like = node.meta["val"]

    def run(*values: Any) -> tuple[Tensor, Tensor]:
        given = dict(zip(nodes, values, strict=True))
        operands = [given[name] if order == (0, 1, 2, 3) else given[name].permute(order) for name in _REQUIRED]
        scale = pattern.scale
        if scale is None:
            size = operands[0].size(-1)
            scale = 1.0 / math.sqrt(size) if isinstance(size, int) else 1.0
            if not isinstance(size, int):  # known at run time only: into the query, never read
                operands[0] = operands[0] * size**-0.5
        out, _ = attention(
            *operands,
            *(_four_dims(given.get(name)) for name in ("mask", "bias")),
            given.get("sinks"),
            scale=float(scale),
            softcap=float(pattern.softcap),
            **{name: given.get(name, getattr(pattern, name)) for name in _BOUNDS},
        )
        result = out
        if (pattern.output or pattern.layout) != "BNSD":
            result = out.permute(_OPERANDS["BSND"])
        if pattern.output == "BSH":
            result = result.flatten(2)
        return conform(result.to(like.dtype), like), out

    result, out = trace_before(gm, node, run, list(nodes.values()), decompositions, seen)
    assert result is not None and out is not None
    (canonical,) = out.all_input_nodes
    mark_site(canonical, record)
    node.replace_all_uses_with(result)


def _four_dims(x: Tensor | None) -> Tensor | None:
    return None if x is None or x.dim() == 4 else x[(None,) * (4 - x.dim())]


def _broadcasts(shape: torch.Size, full: tuple[Size, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(full), strict=False)
    return len(shape) <= len(full) and all(known(a == 1) or known(a == b) for a, b in pairs)


def _same(shape: torch.Size, wanted: tuple[Size, ...]) -> bool:
    return len(shape) == len(wanted) and all(known(a == b) for a, b in zip(shape, wanted, strict=True))


def _text(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"
