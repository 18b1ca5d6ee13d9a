"""The leaves of nested inputs and outputs, under the paths that a user would write: "cache.0.keys"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils import _pytree as pytree


def is_host_list(value: Any) -> bool:
    """Whether it is a list or tuple of ints, such as the lengths of sequences: one leaf, not many."""
    return type(value) in (list, tuple) and bool(value) and all(type(item) is int for item in value)


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Callable[[list[Any]], Any]]:
    """Every leaf with its path, and what puts other leaves in their place."""
    leaves, spec = pytree.tree_flatten(tree, is_leaf=is_host_list)
    paths = list(_paths(tree, ""))
    return list(zip(paths, leaves, strict=True)), lambda values: pytree.tree_unflatten(values, spec)


def children(node: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """What a container that pytree knows holds, by name, and its own structure."""
    values, spec = pytree.tree_flatten(node, is_leaf=lambda value: value is not node)
    return list(zip(_names(node, len(values)), values, strict=True)), spec


def _paths(tree: Any, path: str) -> Iterator[str]:
    if is_host_list(tree) or pytree.tree_is_leaf(tree):
        yield path
        return
    for name, child in children(tree)[0]:
        yield from _paths(child, f"{path}.{name}" if path else name)


def _names(node: Any, count: int) -> list[str]:
    names: list[str] = []
    if isinstance(node, Mapping):
        names = [str(key) for key in node]
    elif pytree.is_namedtuple_instance(node):
        names = list(node._fields)
    elif dataclasses.is_dataclass(node):
        names = [field.name for field in dataclasses.fields(node)]
    return names if len(names) == count else [str(index) for index in range(count)]


def list_name(path: str) -> str:
    """The name of what stands there: the last part of its path that is no index."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)
