"""Caps of scores are numbers of the graph, also where dynamic=True would make them inputs.

before: tanh(scores / cap) * cap, cap a float that Dynamo made an input
after:  the same with the number in its place, and a guard that recompiles when it changes

Kernels take the cap as an attribute. It is a constant of a model, so the guard is one that never fails.
"""

from __future__ import annotations

import torch
from torch import fx

_DIVISIONS = ("truediv", "itruediv", "div", "true_divide", "mul", "imul")
_PRODUCTS = ("mul", "imul")
_TANH = ("tanh", "tanh_")


def specialise_softcaps(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if _name(node) in _TANH and node.args and isinstance(node.args[0], fx.Node):
            inside = node.args[0]
            outside = [user for user in node.users if _name(user) in _PRODUCTS]
            for step in (inside, *outside) if _name(inside) in _DIVISIONS else ():
                step.args = tuple(_constant(x) for x in step.args)


def _constant(argument: object) -> object:
    """A symbolic float as the number that it is now, under a guard; anything else as it is."""
    value = argument.meta.get("example_value") if isinstance(argument, fx.Node) else None
    return float(value) if isinstance(value, torch.SymFloat) else argument


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
