"""The sizes that graphs are captured for, and which dimensions of inputs and outputs have them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Dims = tuple["str | None", ...]


class Bucket(NamedTuple):
    """A size of a call: how many sequences, and how many tokens of each (or of all, where they are packed)."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch}, tokens {self.tokens}"

    def holds(self, other: Bucket) -> bool:
        return self.batch >= other.batch and self.tokens >= other.tokens

    def common(self, other: Bucket) -> Bucket:
        """The size that fits into both."""
        return Bucket(min(self.batch, other.batch), min(self.tokens, other.tokens))


@dataclass(frozen=True)
class Refusal:
    """Why a call runs eagerly: `rule` is counted, `reason` names the values."""

    rule: str
    reason: str


@dataclass(frozen=True)
class Declared:
    """A setting by path: what stands at "cache" holds for "cache.0" too, unless that has its own; "" is everything."""

    entries: Mapping[str, Any]
    default: Any

    def of(self, path: str) -> Any:
        entry = self.entry(path)
        return self.default if entry is None else self.entries[entry]

    def entry(self, path: str) -> str | None:
        """The entry that holds for a path."""
        while path not in self.entries:
            if not path:
                return None
            path = path.rpartition(".")[0]
        return path


def checked_buckets(buckets: Iterable[Any]) -> tuple[Bucket, ...]:
    """The smallest first. Raises ValueError for what is no size."""
    if not isinstance(buckets, Iterable) or isinstance(buckets, str):
        raise ValueError(f"buckets = {buckets!r}: give a list of sizes, such as [(1, 1), (8, 1), (8, 16)]")
    found = set()
    for bucket in buckets:
        sizes = tuple(bucket) if isinstance(bucket, Iterable) else (bucket, 1)
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(
                f"buckets: {bucket!r} is no bucket: give (batch, tokens), two ints from 1 on, or the batch alone for "
                "one token each"
            )
        found.add(Bucket(*sizes))
    if not found:
        raise ValueError("buckets is empty: give the sizes to capture, such as [(1, 1), (8, 1), (8, 16)]")
    return tuple(sorted(found, key=lambda bucket: (bucket.batch * bucket.tokens, bucket)))


def checked_dims(dims: Any, option: str) -> dict[str, Dims]:
    """By path; a tuple alone is for everything. Raises ValueError for a dimension that is neither batch nor tokens."""
    entries = dims if isinstance(dims, Mapping) else {"": dims}
    for path, names in entries.items():
        if not isinstance(names, (tuple, list)):
            raise ValueError(
                f"{option}[{path!r}] = {names!r}: name the dimensions in a tuple, such as ('batch', 'tokens')"
            )
        for name in names:
            if name is not None and name not in Bucket._fields:
                raise ValueError(
                    f"{option}[{path!r}]: unknown dimension {name!r}: a dimension is 'batch', 'tokens', or None for "
                    "one that keeps its size"
                )
    return {path: tuple(names) for path, names in entries.items()}


def check_names(paths: Iterable[str], known: Iterable[str], option: str) -> None:
    """Raises ValueError for a path that starts with no input's name."""
    known = list(known)
    for path in paths:
        root = path.partition(".")[0]
        if root not in known:
            close = difflib.get_close_matches(root, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its inputs are {', '.join(known) or 'none'}"
            raise ValueError(f"{option}: the callable has no input {root!r}: {hint}")


def absent(declared: Iterable[str], leaves: Collection[str]) -> list[str]:
    """The paths that no leaf lies under."""
    return [path for path in declared if path and not any(f"{leaf}.".startswith(f"{path}.") for leaf in leaves)]


def check_paths(declared: Collection[str], leaves: Collection[str], option: str) -> None:
    """Raises ValueError for a path that no leaf lies under, beside a leaf of much the same path that has no entry.

    Other paths may be of what only some calls have.
    """
    for path in absent(declared, leaves):
        close = difflib.get_close_matches(path, [leaf for leaf in leaves if leaf not in declared], n=1, cutoff=0.8)
        if close:
            raise ValueError(f"{option}[{path!r}]: there is no {path!r}: did you mean {close[0]!r}?")


def check_pad(path: str, value: Any, dtype: torch.dtype) -> None:
    """Raises ValueError for padding that a tensor of that dtype cannot hold."""
    if isinstance(value, (bool, int, float)):
        if dtype.is_floating_point or dtype.is_complex:
            return
        low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if low <= value <= high and int(value) == value:
            return
    raise ValueError(f"pad[{path!r}] = {value!r}: {path} is {dtype}, pad it with a number of that dtype")


def check_axes(buckets: Iterable[Bucket], dims: Mapping[str, Dims]) -> None:
    """Raises ValueError for a bucket of several batches or tokens where no input has such a dimension."""
    named = {name for names in dims.values() for name in names}
    for bucket in buckets:
        for name, size in zip(Bucket._fields, bucket, strict=True):
            if size > 1 and name not in named:
                raise ValueError(
                    f"buckets: {tuple(bucket)} has {name} {size}, but no input of `dims` has a dimension {name!r}: "
                    "name it there, or leave it at 1"
                )


def real_size(leaves: Iterable[tuple[str, Any]], dims: Declared) -> Bucket | Refusal:
    """The batch and tokens of a call; 1 where no input has them.

    Raises ValueError for an input of fewer dimensions than it was declared with.
    """
    seen: dict[str, tuple[int, str]] = {}
    for path, leaf in leaves:
        names, shape = dims.of(path), _shape(leaf)
        if not names or leaf is None:
            continue
        if len(shape) < len(names):
            raise ValueError(
                f"{path or 'the input'} has {len(shape)} dimensions, but dims names {len(names)}: {names}; name those "
                "that it has"
            )
        for name, size in zip(names, shape, strict=False):
            if name is None:
                continue
            first, where = seen.setdefault(name, (size, path))
            if first != size:
                reason = f"{name} is {first} in {where} and {size} in {path}: a bucket has one size for all inputs"
                return Refusal("inputs differ in size", reason)
    return Bucket(*(seen[name][0] if name in seen else 1 for name in Bucket._fields))


def bucket_of(size: Bucket, buckets: Iterable[Bucket]) -> Bucket | Refusal:
    """The first that holds it."""
    for bucket in buckets:
        if bucket.holds(size):
            return bucket
    return Refusal("no bucket is large enough", f"{size}: no bucket holds it")


def _shape(leaf: Any) -> tuple[int, ...]:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    return (len(leaf),) if isinstance(leaf, (list, tuple)) else ()


def widened(leaf: Any, names: Dims, bucket: Bucket) -> tuple[int, ...]:
    """The shape of a tensor or list when it is as large as the bucket."""
    shape = _shape(leaf)
    sizes = [size if name is None else getattr(bucket, name) for name, size in zip(names, shape, strict=False)]
    return (*sizes, *shape[len(sizes) :])


def cut(tensor: Tensor, names: Dims, size: Bucket) -> Tensor:
    """The part of a tensor that belongs to a call of that size, as a view."""
    for axis, name in enumerate(names):
        if name is not None and tensor.shape[axis] != getattr(size, name):
            tensor = tensor.narrow(axis, 0, getattr(size, name))
    return tensor
