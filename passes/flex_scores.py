"""FlexAttention's `score_mod` in the canonical op's terms: a factor, a softcap, a bias, and scores that are not kept.

    score * 0.5                                                  factor
    20 * tanh(score / 20)                                        softcap
    score + slopes[h] * (j - i)                                  bias
    where(i >= j, score, -inf)                                   kept

They may follow each other in the order in which the canonical op applies them. A score that is used in any other way
is a refusal.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sgl_npu.passes.site import Refusal

_ADD = (operator.add, operator.iadd, torch.add, "add")
_SUB = (operator.sub, operator.isub, torch.sub, "sub")
_MUL = (operator.mul, operator.imul, torch.mul, "mul")
_DIV = (operator.truediv, operator.itruediv, torch.div, "div")
_TANH = (torch.tanh, "tanh")
_WHERE = (torch.where,)
_ARITHMETIC = (*_ADD, *_SUB, *_MUL, *_DIV, *_TANH, *_WHERE)
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)  # of those
_NAMES = "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem"
_WRITING = tuple(getattr(operator, name) for name in _NAMES.split())
_LARGEST = 1e30  # a factor or cap, or one over it: float32 holds them and their products with scores


@dataclass(frozen=True)
class ScoreMod:
    """Each of `added` (with whether it is subtracted) and of `kept` is a function of (b, h, i, j, *buffers)."""

    factor: float = 1.0
    softcap: float = 0.0
    added: tuple[tuple[bool, fx.GraphModule], ...] = ()
    kept: tuple[fx.GraphModule, ...] = ()


@dataclass(frozen=True)
class _Read:
    """A value that depends on the score. `is_tanh`: it is tanh(factor * score), to be a softcap by what follows."""

    factor: float = 1.0
    softcap: float = 0.0
    is_tanh: bool = False
    added: tuple[tuple[bool, fx.Node], ...] = ()  # each with whether it is subtracted
    kept: tuple[fx.Node, ...] = ()

    @property
    def is_plain(self) -> bool:
        return not (self.softcap or self.is_tanh or self.added or self.kept)

    def finished(self) -> _Read:
        """Before anything is added: a tanh that nothing multiplied is a softcap of 1."""
        return replace(self, softcap=1.0, is_tanh=False) if self.is_tanh else self


class _Unknown(Exception):
    pass


def read_score_mod(score_mod: fx.GraphModule) -> ScoreMod | Refusal:
    """What a score_mod, as Dynamo traced it, does to a score; a refusal where the canonical op cannot."""
    inputs = list(score_mod.graph.find_nodes(op="placeholder"))
    (result,) = score_mod.graph.output_node().args
    result = result[0] if isinstance(result, (tuple, list)) else result
    dependent = _dependents(inputs[0])
    try:
        _check_in_place(score_mod.graph, inputs[0])
        found = _read(result, inputs[0], dependent).finished()
    except _Unknown as unknown:
        return Refusal(f"score_mod: {unknown}")
    added = tuple((is_negative, _function(score_mod, node, dependent)) for is_negative, node in found.added)
    kept = tuple(_function(score_mod, node, dependent) for node in found.kept)
    return ScoreMod(found.factor, found.softcap, added, kept)


def _check_in_place(graph: fx.Graph, score: fx.Node) -> None:
    """A graph is read by its data flow: only a fresh result, or the score, that nobody else has may be written to."""
    for node in graph.nodes:
        if not _writes(node):
            continue
        written = node.args[0] if node.target in _IN_PLACE else None
        fresh = isinstance(written, fx.Node) and (written is score or written.target in _ARITHMETIC)
        if not fresh or len(written.users) != 1:  # type: ignore[union-attr]
            raise _Unknown(f"{_name(node)} writes in place")


def _writes(node: fx.Node) -> bool:
    name = _name(node).partition(".")[0]
    is_named = (name.endswith("_") and not name.startswith("__")) or node.target in _WRITING
    is_asked = bool(node.kwargs.get("out") or node.kwargs.get("inplace"))
    return node.op in ("call_method", "call_function") and (is_named or is_asked)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _dependents(score: fx.Node) -> set[fx.Node]:
    found, queue = {score}, [score]
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return found


def _read(node: Any, score: fx.Node, dependent: set[fx.Node]) -> _Read:
    if node is score:
        return _Read()
    if node not in dependent:
        raise _Unknown("its result does not depend on the score")
    unknown = _Unknown(f"{_name(node)} of the score is none of a factor, a softcap, a bias and a mask")
    operands = [x for x in node.args if isinstance(x, fx.Node) and x in dependent]
    if len(operands) != 1 or node.kwargs or any(x in dependent for x in node.all_input_nodes if x not in operands):
        raise unknown
    found = _read(operands[0], score, dependent)
    if node.target in _TANH and found.is_plain:
        return replace(found, is_tanh=True)
    is_second = node.args[0] is not operands[0]
    other = node.args[0] if is_second else (*node.args, None)[1]
    if node.target in _MUL or (node.target in _DIV and not is_second):
        if isinstance(other, (int, float)) and (found.is_plain or (found.is_tanh and other > 0)):
            times = other if node.target in _MUL else 1 / other if other else 0.0
            softcap = float(times) if found.is_tanh else 0.0
            if all(1 / _LARGEST < abs(x) < _LARGEST for x in (times, found.factor * times)):
                return _Read(found.factor * times, softcap)
    elif node.target in _ADD or (node.target in _SUB and not is_second):
        if isinstance(other, fx.Node) and isinstance(other.meta.get("example_value"), torch.Tensor):
            return replace(found.finished(), added=(*found.added, (node.target in _SUB, other)))
    elif node.target in _WHERE and isinstance(node.args[0], fx.Node):
        condition, kept, masked = node.args
        if kept is operands[0] and masked == -math.inf:
            return replace(found.finished(), kept=(*found.kept, condition))
    raise unknown


def _function(score_mod: fx.GraphModule, wanted: fx.Node, dependent: set[fx.Node]) -> fx.GraphModule:
    """What a node holds, as a function of all inputs but the score."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in score_mod.graph.nodes:
        if node not in dependent and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[wanted])
    graph.eliminate_dead_code()
    return fx.GraphModule(score_mod, graph)
