"""Run a graph op by op and look at the results of some of its nodes.

A node knows its site, which a dispatched op does not, so the graph is interpreted. What a node was given is looked at
right after it ran and then let go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph_module import GraphModule

Watcher = Callable[[tuple, dict, Any], None]


def watched(part: GraphModule, watchers: Mapping[fx.Node, Watcher]) -> Callable:
    """What runs the graph and calls each watcher with (args, kwargs, result) of its node, unless they have no data."""

    def run(args: list[Any]) -> Any:
        return _Watching(part, watchers).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Watching(fx.Interpreter):
    def __init__(self, part: GraphModule, watchers: Mapping[fx.Node, Watcher]) -> None:
        super().__init__(part)
        self.watchers = watchers
        self.extra_traceback = False  # errors of the model stay as they are

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.watchers:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if not any(_has_no_data(x) for x in (*args, result)):
                self.watchers[n](args, kwargs, result)
        return result


def _has_no_data(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (isinstance(x, FakeTensor) or x.is_meta)
