"""Weights that graphs read side by side: joined once, and again into the same memory when one of them has changed.

Graphs of one model, for a prompt and for a token, share what is joined. Layers that are compiled one by one share a
graph and bring weights of their own: there is a joined weight for each tuple of them. It goes with the first of its
weights, or with the last graph that reads it, and holds no weight alive.

The replays of a captured graph ask nobody. Who captures and replays keeps what `noting` gives, and refreshes that
before each replay; in any other capture the weights are joined by the captured graph itself, in every replay.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sgl_npu.runtime.tensor_state import TensorState

MOST = 256  # joined weights of one input; the oldest is given up, and made anew if it is asked for again


@dataclass(frozen=True)
class Join:
    """Tensors that are joined along `dim`, by what number of input they are: None for as many zeros as `sizes` says."""

    numbers: tuple[int | None, ...]
    sizes: tuple[int, ...]
    dim: int

    def weights(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [inputs[number] for number in self.numbers if number is not None]

    def other_sizes(self, x: Tensor) -> tuple[int, ...]:
        return tuple(size for dim, size in enumerate(x.shape) if dim != self.dim)

    def tensor(self, weights: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The joined tensor, in the memory of `out` if there is one; an ordinary tensor without a gradient."""
        given = iter(weights)
        with torch.inference_mode(False), torch.no_grad():
            parts = [
                weights[0].new_zeros(size) if number is None else next(given)
                for number, size in zip(self.numbers, self.sizes, strict=True)
            ]
            return torch.cat(parts, self.dim) if out is None else torch.cat(parts, self.dim, out=out)


class JoinedWeight:
    """The join of some weights as they were when it was last made, always in the same memory."""

    def __init__(self, join: Join, weights: Sequence[Tensor]) -> None:
        _count_optimizer_steps()
        self._join, self._gone = join, functools.partial(_forget, weakref.ref(self))
        self.holders: weakref.WeakSet[MergedWeight] = weakref.WeakSet()
        self._states = self._seen(weights)  # first: a write while they are joined is a change
        self.tensor = join.tensor(weights)

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        return self._steps == _steps and all(map(TensorState.is_of, self._states, weights))

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether it is the join of these tensors, and they are as large as they were, of the same dtype and device."""
        if any(state.tensor() is not weight for state, weight in zip(self._states, weights, strict=True)):
            return False
        kinds = [(x.dtype, x.device, *self._join.other_sizes(x)) for x in (self.tensor, weights[0])]
        return kinds[0] == kinds[1]

    def update(self, weights: Sequence[Tensor]) -> None:
        self._states = self._seen(weights)
        self._join.tensor(weights, self.tensor)

    def refresh(self) -> None:
        """Join the weights again where one has changed. Where one is gone, nothing can have changed it."""
        weights = [state.tensor() for state in self._states]
        held = [weight for weight in weights if weight is not None]
        if len(held) == len(weights) and not self.is_of(held) and self.fits(held):
            self.update(held)

    def _seen(self, weights: Sequence[Tensor]) -> list[TensorState]:
        self._steps = _steps
        return [TensorState.of(weight, self._gone) for weight in weights]


def _forget(joined: weakref.ref[JoinedWeight], _: Any) -> None:
    """A weight is gone."""
    found = joined()
    if found is not None:
        for holder in list(found.holders):
            holder.forget(found)


class MergedWeight:
    """The value of one input that a graph was given: the join of others, as they are at each call."""

    def __init__(self, join: Join) -> None:
        self._join = join
        self._kind = tuple(number is None for number in join.numbers), join.sizes, join.dim
        self._joined: dict[tuple[int, ...], JoinedWeight] = {}  # by the identity of the weights

    def __call__(self, inputs: Sequence[Any]) -> Tensor:
        weights = self._join.weights(inputs)
        key = tuple(map(id, weights))
        joined = self._joined.get(key)
        if joined is None or not joined.is_of(weights):
            if any(map(_is_unknown, weights)) or _is_capturing(weights[0]):
                return self._join.tensor(weights)
            joined = self._changed(key, weights)
        if _noted is not None:
            _noted.append(joined)
        elif _is_capturing(joined.tensor):
            return self._join.tensor(weights)
        return joined.tensor

    def _changed(self, key: tuple[int, ...], weights: list[Tensor]) -> JoinedWeight:
        joined = _shared.get((key, self._kind))
        if joined is None or not joined.fits(weights):
            joined = _shared[key, self._kind] = JoinedWeight(self._join, weights)
        elif not joined.is_of(weights):
            joined.update(weights)
        if key not in self._joined and len(self._joined) >= MOST:
            del self._joined[next(iter(self._joined))]
        self._joined[key] = joined
        joined.holders.add(self)
        return joined

    def forget(self, joined: JoinedWeight) -> None:
        self._joined = {key: other for key, other in self._joined.items() if other is not joined}


# What all graphs have joined, by the identity of the weights and how they are joined.
_shared: weakref.WeakValueDictionary[tuple[tuple[int, ...], Any], JoinedWeight] = weakref.WeakValueDictionary()

_steps = 0  # of optimizers, in this process


@functools.cache
def _count_optimizer_steps() -> None:
    """Fused optimizers write to parameters and count no version (seen in torch 2.13), so every step is a change."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


_noted: list[JoinedWeight] | None = None


@contextlib.contextmanager
def noting() -> Iterator[list[JoinedWeight]]:
    """A list that grows by every joined weight that is read in the body: who replays the body refreshes them first."""
    global _noted
    outer, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = outer


def _is_unknown(weight: Tensor) -> bool:
    """Whether nothing tells of writes to it."""
    return type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_inference()


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a graph is being captured on the tensor's device."""
    if tensor.is_cpu:
        return False
    ask = getattr(torch.get_device_module(tensor.device), "is_current_stream_capturing", None)
    return ask is not None and ask()
