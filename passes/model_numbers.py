"""Numbers of a model that kernels take as attributes: numbers of the graph, also where dynamic=True makes inputs.

before: tanh(scores / cap) * cap, or rsqrt(mean(x²) + eps), cap and eps floats that Dynamo made inputs
after:  the same with the number in its place, and a guard that recompiles when it changes

They are constants of a model, so the guard is one that never fails.
"""

from __future__ import annotations

import torch
from torch import fx

_DIVISIONS = ("truediv", "itruediv", "div", "true_divide", "mul", "imul")
_PRODUCTS = ("mul", "imul")
_SUMS = ("add", "iadd", "add_")
_TANH = ("tanh", "tanh_")
_NORMS = ("rms_norm",)


def specialise_softcaps(graph: fx.Graph) -> None:
    """Caps of scores."""
    for node in graph.nodes:
        if _name(node) in _TANH and node.args and isinstance(node.args[0], fx.Node):
            inside = node.args[0]
            outside = [user for user in node.users if _name(user) in _PRODUCTS]
            for step in (inside, *outside) if _name(inside) in _DIVISIONS else ():
                step.args = tuple(_constant(x) for x in step.args)


def specialise_norms(graph: fx.Graph) -> None:
    """What an RMS norm adds to a mean."""
    for node in graph.nodes:
        is_mean = any(isinstance(x, fx.Node) and _name(x) == "mean" for x in node.args)
        if _name(node) in _NORMS or (_name(node) in _SUMS and is_mean):
            node.args = tuple(_constant(x) for x in node.args)
            node.kwargs = {name: _constant(x) for name, x in node.kwargs.items()}


def _constant(argument: object) -> object:
    """A symbolic float as the number that it is now, under a guard; anything else as it is."""
    value = argument.meta.get("example_value") if isinstance(argument, fx.Node) else None
    return float(value) if isinstance(value, torch.SymFloat) else argument


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
