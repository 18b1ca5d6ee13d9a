"""Channels through sums, products and norms: rules of the walk."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from sgl_npu.passes.channel_walk import Channels, Result, Rule, labels_of, shape_of
from sgl_npu.passes.channels import CHANNEL, Labels, Stuck, Values, columns_of, joined, negated
from sgl_npu.passes.rms_norm import rms_norm


def multiply(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    normalised = normalise(walk, node, labels)
    if normalised is not None:
        return normalised
    parts = [walk.operand(node, x, labels) for x in node.args[:2]]
    one, other = parts
    if isinstance(one, Stuck) or isinstance(other, Stuck):
        return None
    if node.meta["val"].is_complex():
        return _complex_product(walk, one, other) if _are_complex(node) else walk.factors.product(one, other)
    if one.heads is None and other.heads is None:
        return one if _is_one(node.args[1]) else walk.pointwise(node, labels)
    learned = _learned(walk, node, labels, one, other, "weight")
    if learned is None and _is_scale(node, labels, one, other):
        return None
    return walk.factors.product(one, other) if learned is None else learned


def _is_scale(node: fx.Node, labels: Labels, one: Values, other: Values) -> bool:
    """A number, or the weight of a norm that was not recognised, before anything is rotated."""
    values, operand = (one, node.args[1]) if one.heads is not None else (other, node.args[0])
    if values.heads is None or not values.is_plain:
        return False
    if not isinstance(operand, fx.Node) or not shape_of(operand):
        return True
    own = labels_of(operand, labels)
    return values.heads.labels is not None and own[-1:] == (CHANNEL,) and bool(set(own[:-1]) <= {None})


def _is_one(x: Any) -> bool:
    return not isinstance(x, fx.Node) and x == 1


def _are_complex(node: fx.Node) -> bool:
    return all(isinstance(x, fx.Node) and x.meta["val"].is_complex() for x in node.args[:2])


def _complex_product(walk: Channels, one: Values, other: Values) -> Values | Stuck:
    a, b = ([x.map(operator.itemgetter((..., part))) for part in (0, 1)] for x in (one, other))
    parts = []
    for pairs in (((0, 0, 1), (1, 1, -1)), ((0, 1, 1), (1, 0, 1))):
        products = [walk.factors.product(a[i], b[j]) for i, j, _ in pairs]
        if any(isinstance(x, Stuck) for x in products):
            return products[0]
        total = walk.factors.sum(products[0], products[1], pairs[1][2])  # type: ignore[arg-type]
        if isinstance(total, Stuck):
            return total
        parts.append(total)
    return joined(parts, lambda arrays: np.stack(arrays, -1))


def add(sign: int) -> Rule:
    def rule(walk: Channels, node: fx.Node, labels: Labels) -> Result:
        parts = [walk.operand(node, x, labels) for x in node.args[:2]]
        one, other = parts
        if isinstance(one, Stuck) or isinstance(other, Stuck):
            return None
        if (one.heads is None and other.heads is None) or node.kwargs.get("alpha", 1) != 1:
            return None if node.meta["val"].is_complex() else walk.pointwise(node, labels)
        learned = _learned(walk, node, labels, one, other, "bias") if sign == 1 else None
        return walk.factors.sum(one, other, sign) if learned is None else learned

    return rule


def negate(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    found = walk.of(node.args[0], labels)
    return found if isinstance(found, Stuck) else negated(found)


def divide(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    normalised = normalise(walk, node, labels)
    return walk.pointwise(node, labels) if normalised is None else normalised


def normalise(walk: Channels, node: fx.Node, labels: Labels) -> Result:
    """An RMS norm over all channels of each head."""
    found = rms_norm(node)
    if found is None:
        return None
    channels = walk.of(found.source, labels)
    if isinstance(channels, Stuck):
        return channels
    size = found.source.meta["val"].shape[-1]
    heads, columns = channels.heads, channels.terms[0].column
    normalised = channels.range
    if heads is not None and len(channels.terms) > 1:
        return Stuck("it is normalised after it is rotated")
    if heads is None or normalised is None or heads.eps is not None or labels[-1] != CHANNEL or size != columns.size:
        return Stuck("an RMS norm is not over the channels of a head as they are projected")
    if heads.count > 1 and size > heads.stride:
        return Stuck("an RMS norm is over several heads")
    if found.weight is not None and tuple(found.weight.meta["val"].shape) != (size,):
        return None
    return columns_of(replace(heads, eps=found.eps, weight=found.weight, normalised=normalised), columns)


def _learned(
    walk: Channels, node: fx.Node, labels: Labels, one: Values, other: Values, name: str
) -> Values | Stuck | None:
    """The weight or bias of a norm: a number for each channel."""
    values, table = (one, other) if one.heads is not None else (other, one)
    operand = node.args[1 if values is one else 0]
    heads, column = values.heads, values.terms[0].column
    if heads is None or heads.eps is None or table.heads is not None or values.range != heads.normalised:
        return None
    if not isinstance(operand, fx.Node) or getattr(heads, name) is not None or heads.bias is not None:
        return None
    own = labels_of(operand, labels)
    if own[-1:] != (CHANNEL,) or not set(own[:-1]) <= {None} or not column.shape[-1] == column.size == table.size:
        return None
    return columns_of(replace(heads, weight=operand) if name == "weight" else replace(heads, bias=operand), column)
