"""What the entries of a tensor are, exactly and all of them: one number, a band of one number in another, or positions.

A form is guessed from a row and a column, built anew and compared with every entry. What differs anywhere has no form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_npu.passes.index_values import FLOATS, INTEGERS

_MOST_ENTRIES = 2**26  # an 8192 x 8192 mask: more is not worth reading while compiling

Number = int | float | bool


@dataclass(frozen=True)
class Constant:
    """The same number everywhere."""

    value: Number

    def build(self, like: Tensor) -> Tensor:
        return torch.full(like.shape, self.value, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Band:
    """`inside` where lower <= j - i <= upper, i and j the last two indices, and `outside` elsewhere. None: no bound."""

    inside: Number
    outside: Number
    lower: int | None
    upper: int | None

    def build(self, like: Tensor) -> Tensor:
        rows, keys = (torch.arange(n, dtype=torch.int32, device=like.device) for n in like.shape[-2:])
        distance = keys - rows.unsqueeze(1)
        sides = [distance <= self.upper] if self.upper is not None else []
        sides += [distance >= self.lower] if self.lower is not None else []
        condition = sides[0] & sides[1] if len(sides) == 2 else sides[0]
        if like.dtype == torch.bool:
            return (condition if self.inside else ~condition).expand(like.shape)
        inside, outside = (torch.full((), x, dtype=like.dtype, device=like.device) for x in (self.inside, self.outside))
        return torch.where(condition, inside, outside).expand(like.shape)


@dataclass(frozen=True)
class Positions:
    """first + step * (the index along `dim`, counted from the last dimension)."""

    first: int
    step: int
    dim: int

    def build(self, like: Tensor) -> Tensor:
        end = self.first + self.step * like.size(self.dim)
        positions = torch.arange(self.first, end, self.step, dtype=like.dtype, device=like.device)
        for _ in range(-1 - self.dim):
            positions = positions.unsqueeze(-1)
        return positions.expand(like.shape)


Form = Constant | Band | Positions


def recognise(tensor: Tensor) -> Form | None:
    """The form of a tensor of bools, integers or floats, read in full; None where it has none."""
    if not 0 < tensor.numel() <= _MOST_ENTRIES or tensor.dtype not in (torch.bool, *INTEGERS, *FLOATS):
        return None
    if tensor.numel() == 1 and tensor.dtype in INTEGERS:
        return None  # a counter, which the next call finds changed
    x = _without_repetition(tensor.detach()).cpu()
    guesses = (_constant(x), _positions(x), _band(x))
    return next((form for form in guesses if form is not None and torch.equal(form.build(x), x)), None)


def _without_repetition(x: Tensor) -> Tensor:
    """One entry of every dimension along which memory is the same; such dimensions decide nothing."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1 and dim < x.dim() - 2:
            x = x.narrow(dim, 0, 1)
    return x


def _constant(x: Tensor) -> Constant:
    return Constant(x.flatten()[0].item())


def _positions(x: Tensor) -> Positions | None:
    if x.dtype not in INTEGERS:
        return None
    for dim in range(-x.dim(), 0):
        line = x.movedim(dim, -1).reshape(-1, x.size(dim))[0]
        if len(line) > 1 and line[0] != line[1]:
            return Positions(int(line[0]), int(line[1]) - int(line[0]), dim)
    return None


def _band(x: Tensor) -> Band | None:
    """From the numbers along the first column, upwards, and on along the first row: one for every value of j - i."""
    if x.dim() < 2:
        return None
    corner = x.reshape(-1, *x.shape[-2:])[0]
    profile = torch.cat((corner[:, 0].flip(0), corner[0, 1:]))
    changes = (profile[1:] != profile[:-1]).nonzero().flatten().tolist()
    if len(changes) not in (1, 2):
        return None
    distances = [change - (x.size(-2) - 1) for change in changes]  # the last j - i before each change
    values = [profile[0].item(), *(profile[change + 1].item() for change in changes)]
    if len(changes) == 1:
        return Band(values[0], values[1], None, distances[0])
    return Band(values[1], values[0], distances[0] + 1, distances[1])
