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

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUB = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_MUL = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_DIV = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_TANH = (torch.tanh, "tanh")
_WHERE = (torch.where,)


@dataclass(frozen=True)
class ScoreMod:
    """`bias` and each of `kept` are functions of (b, h, i, j, *buffers): what is added, and what is kept."""

    factor: float = 1.0
    softcap: float = 0.0
    bias: fx.GraphModule | None = None
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
        found = _read(result, inputs[0], dependent)
    except _Unknown as unknown:
        return Refusal(f"score_mod: {unknown}")
    found = found.finished()
    kept = tuple(_function(score_mod, [(False, node)]) for node in found.kept)
    bias = _function(score_mod, list(found.added)) if found.added else None
    return ScoreMod(found.factor, found.softcap, bias, kept)


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
    name = str(getattr(node.target, "__name__", node.target))
    operands = [x for x in node.args if x in dependent] if node.args else []
    if len(operands) != 1 or node.kwargs or any(x in dependent for x in node.all_input_nodes if x not in operands):
        raise _Unknown(f"{name} of the score is none of a factor, a softcap, a bias and a mask")
    found = _read(operands[0], score, dependent)
    if node.target in _TANH and found.is_plain:
        return replace(found, is_tanh=True)
    first, second = (*node.args, None)[:2]
    other, is_second = (second, False) if first in dependent else (first, True)
    if node.target in _MUL or (node.target in _DIV and not is_second):
        if isinstance(other, (int, float)) and other != 0 and (found.is_plain or (found.is_tanh and other > 0)):
            times = 1 / other if node.target in _DIV else other
            softcap = float(times) if found.is_tanh else 0.0
            return _Read(found.factor * times, softcap)
    elif node.target in _ADD or (node.target in _SUB and not is_second):
        if isinstance(other, fx.Node):
            return replace(found.finished(), added=(*found.added, (node.target in _SUB, other)))
    elif node.target in _WHERE and node.args[1] in dependent and node.args[2] == -math.inf:
        return replace(found.finished(), kept=(*found.kept, node.args[0]))
    raise _Unknown(f"{name} of the score is none of a factor, a softcap, a bias and a mask")


def _function(score_mod: fx.GraphModule, wanted: list[tuple[bool, fx.Node]]) -> fx.GraphModule:
    """The sum of some nodes, each subtracted if its flag says so, as a function of all inputs but the score."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed = _ancestors([node for _, node in wanted])
    for node in list(score_mod.graph.nodes)[1:]:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    total = None
    for is_negative, node in wanted:
        part = graph.call_function(operator.neg, (copies[node],)) if is_negative else copies[node]
        total = part if total is None else graph.call_function(operator.add, (total, part))
    graph.output(total)
    return fx.GraphModule(score_mod, graph)


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found, queue = set(nodes), list(nodes)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                queue.append(node)
    return found
