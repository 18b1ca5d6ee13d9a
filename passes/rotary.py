"""A rotary embedding, read off what each channel of a head is computed from.

halves, c < r/2 and d = c + r/2:  out[c] = x[c] * cos[c] - x[d] * sin[c],  out[d] = x[d] * cos[d] + x[c] * sin[d]
neighbours, c = 2p and d = 2p + 1:  out[c] = x[c] * cos[p] - x[d] * sin[p],  out[d] = x[d] * cos[p] + x[c] * sin[p]

The first r channels are rotated, the others kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgl_npu.passes.channels import ONE, Stuck, Values

NOT_ROTATED = Stuck("it is not rotated")
Signed = tuple[int, int]  # a factor's number and its sign


@dataclass(frozen=True)
class Rotation:
    """Factors for each rotated channel, of neighbours for each pair; `first` is the column where the head starts."""

    first: int
    is_neox_style: bool
    cos: tuple[Signed, ...]
    sin: tuple[Signed, ...]

    @property
    def size(self) -> int:
        """How many channels are rotated."""
        return len(self.cos) * (1 if self.is_neox_style else 2)


def rotation(values: Values, head_dim: int) -> Rotation | Stuck:
    """What rotates a tensor whose channels are all in its last dimension."""
    channels = _channels(values, head_dim)
    first = min((column for terms in channels for column in terms), default=0)
    if any(not terms or not set(terms) <= set(range(first, first + head_dim)) for terms in channels):
        return Stuck("its channels are not those of one head")
    moved = [{column - first: factor for column, factor in terms.items()} for terms in channels]
    size = sum(terms != {c: (ONE, 1)} for c, terms in enumerate(moved))
    if not size:
        return NOT_ROTATED
    if size % 2 or any(len(terms) != 2 or c not in terms for c, terms in enumerate(moved[:size])):
        return Stuck("its channels are permuted, scaled, or not rotated in pairs from the first on")
    for is_neox_style in (True, False):
        found = _of_pairs(moved[:size], first, is_neox_style)
        if found is not None:
            return found
    return Stuck("it rotates channels that are neither half a head apart nor neighbours")


def _channels(values: Values, head_dim: int) -> list[dict[int, Signed]]:
    """For every channel the columns it is a sum of, each with its factor. A column that comes twice makes it empty."""
    channels: list[dict[int, Signed]] = [{} for _ in range(head_dim)]
    twice = set()
    for term in values.terms:
        arrays = (x.ravel().tolist() for x in (term.column, term.sign, term.factor))
        for c, (column, sign, factor) in enumerate(zip(*arrays, strict=True)):
            if sign:
                if column in channels[c]:
                    twice.add(c)
                channels[c][column] = factor, sign
    return [{} if c in twice else terms for c, terms in enumerate(channels)]


def _of_pairs(channels: list[dict[int, Signed]], first: int, is_neox_style: bool) -> Rotation | None:
    half = len(channels) // 2
    cos, sin = [], []
    for c, terms in enumerate(channels):
        is_first = c < half if is_neox_style else c % 2 == 0
        distance = half if is_neox_style else 1
        partner = c + distance if is_first else c - distance
        if partner not in terms:
            return None
        factor, sign = terms[partner]
        cos.append(terms[c])
        sin.append((factor, -sign if is_first else sign))
    if is_neox_style:
        return Rotation(first, True, tuple(cos), tuple(sin))
    if cos[0::2] != cos[1::2] or sin[0::2] != sin[1::2]:
        return None
    return Rotation(first, False, tuple(cos[0::2]), tuple(sin[0::2]))
