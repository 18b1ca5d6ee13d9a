"""Bands in disguise: a band is drawn first, then written down by rewritings that change nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass
class Disguise:
    """Draws lower <= j - i <= upper and a program that computes it, op by op, from a seed."""

    seed: int
    padding: torch.Tensor  # (B, Skv) bool
    ids: torch.Tensor  # (B, Skv) int64
    choose: random.Random = field(init=False)

    def __post_init__(self):
        self.choose = random.Random(self.seed)

    def mask(self, rows, keys):
        pick = self.choose.choice
        lower, upper = pick([None, -3, -1, 0]), pick([None, 0, 0, 1, 3, keys - rows])
        parts = [self.condition(2, rows, keys, self.lower, lower)] if lower is not None else []
        parts += [self.condition(2, rows, keys, self.upper, upper)] if upper is not None else []
        parts += [self.condition(1, rows, keys, self.everything, None)] if not parts or pick([0, 0, 1]) else []
        parts += [self.padding[:, None, None, :keys]] if pick([0, 0, 0, 1]) else []
        self.choose.shuffle(parts)
        joined = parts[0]
        for part in parts[1:]:
            join = [lambda a, b: a & b, torch.logical_and, lambda a, b: a * b, lambda a, b: ~(~a | ~b)]
            join += [lambda a, b: torch.where(a, b, False), lambda a, b: a.expand_as(a & b).masked_fill(~b, False)]
            joined = pick(join)(joined, part)
        return joined

    def condition(self, depth, rows, keys, kind, bound):
        """(rows, keys) bools that say a side of the band, after `depth` rewritings of the whole."""
        if depth == 0 or self.choose.random() < 0.3:
            return kind(rows, keys, bound)
        choose, n = self.choose, self.choose.choice([1, 2])

        def inner(more_rows=0, more_keys=0):
            return self.condition(depth - 1, rows + more_rows, keys + more_keys, kind, bound)

        def tall():  # the same side, of rows and keys counted from n later on
            return self.condition(depth - 1, rows + n, keys + n, kind, bound)

        return choose.choice(
            [
                lambda: inner(n, n)[:rows, :keys],
                lambda: tall()[n:, n:],
                lambda: inner().flip(0).flip(0),
                lambda: inner().flip(-1, -2).flip(-2).flip(-1),
                lambda: inner().roll(n, 0).roll(-n, 0),
                lambda: inner().roll(-n, 1).roll(n, 1),
                lambda: inner()[torch.arange(rows)[:, None], torch.arange(keys)],
                lambda: inner().index_select(0, torch.arange(rows)),
                lambda: inner().gather(1, torch.arange(keys)[None].expand(rows, keys)),
                lambda: F.pad(inner(), (n, 0, 0, 1), value=choose.choice([True, False]))[:rows, n:],
                lambda: torch.cat([inner()[:1], inner()[1:]]),
                lambda: torch.cat(inner().split([1, keys - 1], 1), 1),
                lambda: torch.stack([inner(), inner().logical_not()]).unbind()[0],
                lambda: torch.ones(rows, keys, dtype=torch.bool).slice_scatter(inner(), 0, 0, rows),
                lambda: inner().T.T,
                lambda: inner().to(choose.choice([torch.int32, torch.float32, torch.uint8])) > 0,
                lambda: ~(inner() == 0).logical_not().logical_not(),
                lambda: inner()[None, None].expand(2, 1, rows, keys)[1, 0],
                lambda: inner() & inner(),
                lambda: inner() | (inner() & inner()),
                lambda: torch.where(inner(), True, False),
                lambda: inner().repeat(2, 1)[:rows],
            ]
        )()

    def everything(self, rows, keys, _):
        i, j, k = self.positions(rows, 1)[:, None], self.positions(keys, 1)[None], self.choose.choice([0, 1, 3])
        return self.choose.choice(
            [
                lambda: j + i * 0 >= -k,
                lambda: j - i < keys + k,
                lambda: (j <= i + k) | (j > i + k),
                lambda: (j <= i + k) | (j >= i - k),
                lambda: torch.ones(rows, keys).tril(keys + k).bool(),
                lambda: (i // (k + 1) <= i) & (j >= 0),
            ]
        )()

    def upper(self, rows, keys, bound):
        """j - i <= bound."""
        choose = self.choose
        i, j = self.positions(rows, 2)[:, None], self.positions(keys, 2)[None]
        n, k = choose.choice([1, 2, 3]), choose.choice([0, 1, 4])
        fill = choose.choice([-float("inf"), torch.finfo(torch.float32).min])
        return choose.choice(
            [
                lambda: j <= i + bound,
                lambda: j - i < bound + 1,
                lambda: i - j >= -bound,
                lambda: ~(j > i + bound),
                lambda: n * (j - i) <= n * bound + choose.choice(range(n)),
                lambda: n * j < n * (i + bound) + choose.choice(range(1, n + 1)),
                lambda: (j - i - bound).clamp(min=0) <= 0,
                lambda: (i - j).clamp(-bound - k - 1, 99) >= -bound,
                lambda: (i - j + bound).clamp(max=0) == 0,
                lambda: j <= torch.maximum(i + bound, i + bound - k),
                lambda: torch.maximum(j, j - k) <= torch.minimum(i + bound, i + bound + k),
                lambda: (j <= i + bound) & (j <= i + bound + k),
                lambda: (j <= i + bound + k) & (j <= i + bound) & (j - k <= i + bound),
                lambda: (j <= i + bound) | (j + k <= i + bound),
                lambda: (j < i + bound) | (j == i + bound),
                lambda: torch.where(j > i + bound, False, True),
                lambda: torch.where(j > i + bound, 0, n) == n,
                lambda: torch.ones(rows, keys).tril(bound) == 1,
                lambda: torch.ones(rows, keys).triu(bound + 1).logical_not(),
                lambda: torch.full((rows, keys), fill).triu(bound + 1) == 0,
                lambda: j.float() - i.float() <= float(bound),
            ]
        )()

    def lower(self, rows, keys, bound):
        """j - i >= bound: the other side, seen from behind."""
        choose = self.choose
        i, j = self.positions(rows, 2)[:, None], self.positions(keys, 2)[None]
        n, k = choose.choice([1, 2, 3]), choose.choice([0, 1, 4])
        return choose.choice(
            [
                lambda: j >= i + bound,
                lambda: i - j < 1 - bound,
                lambda: ~(j - bound < i),
                lambda: n * (j - i) >= n * bound - choose.choice(range(n)),
                lambda: torch.minimum(j, j + k) >= torch.maximum(i + bound, i + bound - k),
                lambda: (j - i).clamp(max=bound) == bound,
                lambda: (j >= i + bound) & (j >= i + bound - k),
                lambda: (j >= i + bound) | (j - k >= i + bound),
                lambda: torch.ones(rows, keys, dtype=torch.uint8).triu(bound).bool(),
                lambda: torch.ones(rows, keys).tril() - torch.ones(rows, keys).tril(bound - 1) + (j > i) == 1,
                lambda: ~torch.ones(rows, keys, dtype=torch.bool).tril(bound - 1),
            ]
        )()

    def positions(self, length, depth):
        """(length,) integers: 0, 1, 2, ..."""
        choose = self.choose
        n, k = choose.choice([2, 3, 4]), choose.choice([1, 2, 5])
        if depth == 0 or choose.random() < 0.4:
            return choose.choice(
                [
                    lambda: torch.arange(length),
                    lambda: torch.arange(length, dtype=torch.int32),
                    lambda: torch.arange(length, dtype=torch.float64).long(),
                    lambda: torch.arange(k, length + k) - k,
                    lambda: torch.arange(-k, length - k) + k,
                    lambda: torch.arange(length + k)[k:] - k,
                    lambda: torch.arange(0, n * length, n) // n,
                    lambda: torch.arange(length - 1, -1, -1).flip(0),
                    lambda: torch.ones(length, dtype=torch.long).cumsum(0) - 1,
                    lambda: torch.full((length,), n).cumsum(0) // n - 1,
                    lambda: (torch.ones(length, k, dtype=torch.long) * 2).cumsum(0)[:, 0] // 2 - 1,
                ]
            )()
        x = self.positions(length, depth - 1)
        return choose.choice(
            [
                lambda: x + k - k,
                lambda: -(k - x) + k,
                lambda: (x * n + choose.choice(range(n))) // n,
                lambda: x // n * n + x % n,
                lambda: x - torch.fmod(x, n) + x % n,
                lambda: (x * n + n - 1) % n + x - (n - 1),
                lambda: torch.div(n * x + 1, n, rounding_mode="trunc"),
                lambda: torch.fmod(n * x + 1, n) + x - 1,
                lambda: torch.maximum(x, x - k),
                lambda: torch.minimum(x + k, x),
                lambda: x.clamp(min=0),
                lambda: x.clamp(-k, length + k),
                lambda: x.abs(),
                lambda: torch.where(x >= 0, x, -k),
                lambda: x.masked_fill(x < 0, k),
                lambda: x.roll(1).roll(-1),
                lambda: x[torch.arange(length)],
                lambda: torch.cat([x[:1], x[1:]]),
                lambda: torch.cat([x, x])[:length],
                lambda: F.pad(x, (k, 0))[k:],
                lambda: torch.diff(x, prepend=x[:1] - 1).cumsum(0) - 1,
                lambda: x + (torch.diff(x, prepend=x[:1] - 1) != 1).cumsum(0),
                lambda: x.double().long(),
                lambda: x.view(1, length).squeeze(0),
            ]
        )()
