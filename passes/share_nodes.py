"""Equal nodes of a graph become one, where nobody can tell: what sharing masks and sharing slots have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from sgl_npu.passes.fx_ops import value_numbers


def merge_equal(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Of nodes in graph order, earlier ones take the users of later ones that compute the same."""
    numbers = value_numbers(graph)
    seen: dict[int, fx.Node] = {}
    for node in nodes:
        first = seen.setdefault(numbers[node], node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def private_to(
    starts: Iterable[fx.Node], is_end: Callable[[fx.Node], bool], is_shareable: Callable[[fx.Node], bool]
) -> list[fx.Node]:
    """In graph order, what `starts` are computed from, where it is shareable and nothing but they and ends uses it."""
    ancestors: set[fx.Node] = set()
    queue = list(starts)
    while queue:
        node = queue.pop()
        if node not in ancestors:
            ancestors.add(node)
            queue += node.all_input_nodes
    found: set[fx.Node] = set()
    for node in sorted(ancestors, reverse=True):
        if is_shareable(node) and all(user in found or is_end(user) for user in node.users):
            found.add(node)
    return sorted(found)
