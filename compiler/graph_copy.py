"""A copy of a graph that passes may change while the original stays what it is."""

from __future__ import annotations

from copy import deepcopy

from torch.fx.graph_module import GraphModule


def copied(gm: GraphModule) -> GraphModule:
    """The graph and the graphs nested in it as they are now; tensors and everything else are shared."""
    copy = GraphModule(gm, deepcopy(gm.graph))
    for name, child in copy.named_children():
        if isinstance(child, GraphModule):
            setattr(copy, name, copied(child))
    return copy
