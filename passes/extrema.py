"""The larger and the smaller of two sizes, for a compiler that knows arithmetic on sizes alone (torchair 2.13).

before: torch.sym_max(height, width)        after: width, while a guard says that width >= height
"""

from __future__ import annotations

import torch
from torch import fx

from sgl_npu.runtime.sizes import Size, guard


def choose_extrema(graph: fx.Graph) -> None:
    """Replace every sym_max and sym_min by the operand that it is for the sizes at hand, with a guard.

    Sizes that have no value yet stay as they are: either may be the larger.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (torch.sym_max, torch.sym_min):
            continue
        small, large = node.args if guard(_value(node.args[0]) <= _value(node.args[1])) else reversed(node.args)
        if guard(_value(small) <= _value(large)):
            node.replace_all_uses_with(large if node.target is torch.sym_max else small)
            graph.erase_node(node)


def _value(argument: fx.Node | int) -> Size:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument
