"""The walk back from a tensor to the heads that its channels are computed from.

A rule, one for each op that is known, gets the labels of a result and says what its channels are in terms of those of
its arguments. What has no rule is where the walk ends: heads to start from, or a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from sgl_npu.passes.channels import CHANNEL, HEAD, ROW, SAMPLE, Factors, Heads, Label, Labels, Stuck, Values, columns_of
from sgl_npu.passes.fx_ops import value_numbers
from sgl_npu.runtime.sizes import known

Result = Values | Stuck | None  # None: nothing is known of the op, or not of this use of it
Rule = Callable[["Channels", fx.Node, Labels], Result]

_MOST_CHANNELS = 4096  # each is followed on its own; heads have some hundreds


def labels_of(node: fx.Node, labels: Sequence[Label]) -> Labels:
    """Labels for the dimensions of a tensor, none where the size is 1; they are aligned at the last dimension."""
    shape = shape_of(node)
    own = [*[None] * (len(shape) - len(labels)), *labels][-len(shape) :] if shape else []
    return tuple(None if known(size == 1) else label for size, label in zip(shape, own, strict=True))


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape, a complex number being two channels more."""
    value = node.meta["val"]
    return (*value.shape, 2) if value.is_complex() else tuple(value.shape)


def kept_shape(shape: Sequence[Any], labels: Labels) -> tuple[Any, ...]:
    """The shape of the arrays of a tensor: channels alone."""
    return tuple(size if label == CHANNEL else 1 for size, label in zip(shape, labels, strict=True))


def op_name(node: fx.Node) -> str:
    target = node.target
    return f"'{target._opname}'" if isinstance(target, torch._ops.OpOverload) else f"the {node.op} {node.name!r}"


class Channels:
    """The channels of the tensors of one graph, each computed once. `rules` are those of `channel_rules`."""

    def __init__(self, graph: fx.Graph, rules: Mapping[Any, Rule]) -> None:
        self.factors, self._rules = Factors(), rules
        self._numbers: dict[fx.Node, int] = value_numbers(graph)
        self._first = {number: node for node, number in reversed(self._numbers.items())}
        self._seen: dict[tuple[fx.Node, Labels], Values | Stuck] = {}

    def of(self, node: fx.Node, labels: Sequence[Label]) -> Values | Stuck:
        node, labels = self.first(node), labels_of(node, labels)
        key = node, labels
        if key not in self._seen:
            self._seen[key] = self._computed(node, labels)
        return self._seen[key]

    def _computed(self, node: fx.Node, labels: Labels) -> Values | Stuck:
        channels = kept_shape(shape_of(node), labels)
        if not all(isinstance(x, int) for x in channels):
            return Stuck("the number of channels is no constant")
        if math.prod(channels) > _MOST_CHANNELS or any(labels.count(x) > 1 for x in (SAMPLE, ROW, HEAD)):
            return Stuck("rows, heads or channels are in several dimensions")
        rule = self._rules.get(node.target)
        found = rule(self, node, labels) if rule is not None else self.pointwise(node, labels)
        return self._opaque(node, labels) if found is None else found

    def _opaque(self, node: fx.Node, labels: Labels) -> Values | Stuck:
        """A tensor of which nothing is known: heads to start from, or a table."""
        arrays = kept_shape(shape_of(node), labels)
        if HEAD not in labels:
            return self.factors.table((self._numbers.get(node, node), labels), arrays)
        count = shape_of(node)[labels.index(HEAD)]
        if labels[-1] != CHANNEL or labels.count(CHANNEL) != 1 or ROW not in labels or not isinstance(count, int):
            return Stuck(f"{op_name(node)} is no step of a rotary embedding")
        size = arrays[-1]
        return columns_of(Heads(node, count, size, labels=labels), np.arange(size, dtype=np.int64).reshape(arrays))

    def first(self, node: fx.Node) -> fx.Node:
        """The first that is computed alike: what was written to in place is viewed anew wherever it is read."""
        return self._first[self._numbers[node]] if node in self._numbers else node

    def pointwise(self, node: fx.Node, labels: Labels) -> Result:
        """An op on tables alone, element by element."""
        target = node.target
        if HEAD in labels or not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
            return None
        if torch.Tag.nondeterministic_seeded in target.tags or node.meta["val"].is_complex():
            return None
        tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
        if not tensors or any(x.meta["val"].is_complex() for x in tensors):
            return None
        tables = [self.of(x, labels) for x in tensors]
        if not all(isinstance(x, Values) and x.heads is None for x in tables):
            return None
        order = {x: i for i, x in enumerate(tensors)}
        key = (target, str(fx.map_arg((node.args, node.kwargs), lambda x: f"%{order.get(x, x)}")))
        return self.factors.pointwise(key, [self.ranked(x, node) for x in tables])  # type: ignore[arg-type]

    def ranked(self, values: Values, node: fx.Node) -> Values:
        missing = len(shape_of(node)) - values.terms[0].sign.ndim
        return values.map(lambda x: x.reshape((1,) * missing + x.shape)) if missing else values

    def operand(self, node: fx.Node, x: Any, labels: Labels) -> Values | Stuck:
        """An argument of a pointwise op, broadcast to the rank of the result."""
        rank = len(labels)
        if not isinstance(x, fx.Node):
            return self.factors.table(("number", x), (1,) * rank)
        if not isinstance(x.meta["val"], torch.Tensor):
            return self.factors.table(x, (1,) * rank)
        is_real = node.meta["val"].is_complex() and not x.meta["val"].is_complex()
        own = labels_of(x, labels[:-1] if is_real else labels)
        found = self.of(x, own)
        if isinstance(found, Stuck):
            return found
        if found.heads is None:
            self.factors.note(x, own, found)
        if is_real:
            found = found.map(lambda array: array[..., None])
        return self.ranked(found, node)
