"""Random mask programs of every kind, most of which are no band."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

NUMBERS = (torch.int64, torch.int64, torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass
class Program:
    """Draws a mask, op by op, from a seed. The same seed draws the same ops whatever the tensors are."""

    seed: int
    padding: torch.Tensor  # (B, Skv) bool
    ids: torch.Tensor  # (B, Skv) int64
    choose: random.Random = field(init=False)

    def __post_init__(self):
        self.choose = random.Random(self.seed)

    def mask(self, rows, keys):
        x = self.condition(self.choose.choice([0, 1, 2, 2, 3]), rows, keys)
        return self.finish(x, rows, keys)

    def finish(self, x, rows, keys):
        """A mask in a rank and a shape of the programs users write."""
        if x.dim() < 4 and self.choose.random() < 0.5:
            x = x[(None,) * (4 - x.dim())]
        if self.choose.random() < 0.3:
            x = x.expand(*[self.batch, 2, rows, keys][4 - x.dim() :])
        if self.choose.random() < 0.1:
            x = x.to(torch.int32).to(torch.bool)
        return x

    @property
    def batch(self):
        return self.padding.size(0)

    def small(self):
        return self.choose.choice([0, 0, 1, 1, 2, 3, -1, -2, -3, 5])

    def condition(self, depth, rows, keys):
        """A bool tensor that broadcasts to (rows, keys) in its last two dimensions."""
        pick = self.choose.choice
        if depth == 0:
            return getattr(self, pick(["compare"] * 6 + ["triangle"] * 3 + ["leaf", "constant", "ids_equal"]))(
                rows, keys
            )
        kind = pick(["and", "and", "or", "xor", "not", "where", "fill", "cut", "cat", "flip", "pad", "arith", "index"])
        first = self.condition(depth - 1, rows, keys)
        if kind == "not":
            return pick([lambda x: ~x, torch.logical_not, lambda x: x == 0, lambda x: 1 - x.long() == 1])(first)
        if kind == "flip":
            return first.flip(pick([-1, -2])) if first.dim() > 1 else first
        if kind == "cut":
            wide = self.condition(depth - 1, rows + 2, keys + 3)
            wide = wide.expand(*wide.shape[:-2], rows + 2, keys + 3) if wide.dim() > 1 else wide.expand(rows + 2, -1)
            wide = wide.expand(*wide.shape[:-1], keys + 3)
            a, b = pick([0, 1, 2]), pick([0, 1, 3])
            return wide[..., a : rows + a, b : keys + b] if pick([0, 1]) else wide[..., -rows:, -keys:]
        if kind == "cat":
            dim = pick([-1, -2])
            second = self.condition(depth - 1, rows, keys)
            first, second = (self.dense(x, rows, keys) for x in (first, second))
            size, at = (rows, keys)[dim], pick([0, 1, 2])
            at = min(at, 1) if isinstance(size, int) and size < 2 else at
            return torch.cat([first.narrow(dim, 0, at), second.narrow(dim, 0, size - at)], dim)
        if kind == "pad":
            at = pick([0, 1])
            value = pick([True, False])
            padded = torch.nn.functional.pad(self.dense(first, rows, keys), (at, 0, 0, 0), value=value)
            return padded[:, :keys]
        if kind == "index":
            i, j = torch.arange(rows)[:, None], torch.arange(keys)
            return self.dense(first, rows, keys)[i, j] if pick([0, 1]) else self.dense(first, rows, keys)[:, j]
        second = self.condition(depth - 1, rows, keys)
        if kind == "and":
            return pick([lambda a, b: a & b, torch.logical_and, lambda a, b: a * b])(first, second)
        if kind == "or":
            return pick([lambda a, b: a | b, torch.logical_or, lambda a, b: a + b])(first, second)
        if kind == "xor":
            return pick([lambda a, b: a ^ b, lambda a, b: a != b])(first, second)
        if kind == "arith":
            return pick([lambda a, b: a.long() + b.int() > 1, lambda a, b: a.int() * 2 - b.float() >= 0])(first, second)
        if kind == "fill":
            first, second = torch.broadcast_tensors(first, second)
            return first.masked_fill(second, pick([True, False]))
        third = self.condition(depth - 1, rows, keys)
        return torch.where(first, pick([second, True, False]), pick([third, False, torch.ones((), dtype=torch.bool)]))

    def dense(self, x, rows, keys):
        return x.expand(self.batch, 1, rows, keys)[0, 0] if x.dim() == 4 else x.expand(rows, keys)

    def compare(self, rows, keys):
        relation = self.choose.choice([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne])
        i, j = self.positions(rows, 2)[:, None], self.positions(keys, 2)[None, :]
        if self.choose.random() < 0.4:
            i, j = i - j, self.small()
        if self.choose.random() < 0.15 and isinstance(j, int):
            i = i.abs()
        if self.choose.random() < 0.1 and isinstance(j, int):
            return relation(torch.minimum(i, i * 0 + 2), j)
        x = relation(i, j)
        return x.T.T if self.choose.random() < 0.2 else x

    def positions(self, length, depth):
        """(length,) integers."""
        choose = self.choose
        if depth == 0 or choose.random() < 0.3:
            return choose.choice(
                [
                    lambda: torch.arange(length),
                    lambda: torch.arange(length, dtype=choose.choice(NUMBERS)),
                    lambda: torch.arange(1, length + 1),
                    lambda: torch.arange(length + 1)[1:],
                    lambda: torch.arange(0, 2 * length, 2),
                    lambda: torch.arange(length - 1, -1, -1),
                    lambda: torch.ones(length, dtype=torch.long).cumsum(0),
                    lambda: torch.zeros(length, dtype=torch.long),
                    lambda: torch.arange(length)[torch.arange(length)],
                    lambda: torch.arange(length).roll(1),
                ]
            )()
        x = self.positions(length, depth - 1)
        n = choose.choice([1, 2, 3])
        return choose.choice(
            [
                lambda: x + self.small(),
                lambda: x - self.small(),
                lambda: self.small() - x,
                lambda: x * self.small(),
                lambda: -x,
                lambda: x // n,
                lambda: (x - 2) // n,
                lambda: (x - 2) % n,
                lambda: torch.div(x - 1, n, rounding_mode="trunc"),
                lambda: torch.fmod(x - 1, n),
                lambda: x.clamp(min=self.small()),
                lambda: x.clamp(0, 2),
                lambda: x.clamp(2, 0),
                lambda: torch.maximum(x, self.positions(length, 0)),
                lambda: torch.minimum(x, self.positions(length, 0)),
                lambda: torch.where(x > 1, x, self.positions(length, 0)),
                lambda: x.masked_fill(x == 1, self.small()),
                lambda: x.cumsum(0),
                lambda: x.to(choose.choice(NUMBERS)),
                lambda: x.float().long(),
                lambda: x.flip(0),
                lambda: torch.cat([x[:1] - 1, x])[1:],
                lambda: torch.cat([x[:1], x])[:-1],
                lambda: torch.diff(x, prepend=x[:1] - 1),
                lambda: (torch.diff(x, prepend=x[:1] - 1) != 1).cumsum(0),
                lambda: x + torch.tensor(1),
                lambda: x.int() * 2**30,
                lambda: x + length,
                lambda: torch.cat([x, x])[:length],
                lambda: x.repeat(2)[:length],
                lambda: x[None].repeat(2, 1)[1],
                lambda: x.abs(),
                lambda: x > 1,
            ]
        )().reshape(length)

    def triangle(self, rows, keys):
        make = self.choose.choice([torch.ones, torch.zeros])
        dtype = self.choose.choice([torch.bool, torch.float32, torch.int64, torch.uint8, torch.bfloat16])
        shape = self.choose.choice([(rows, keys), (1, 1, rows, keys)])
        x = make(shape, dtype=dtype)
        if dtype == torch.float32 and self.choose.random() < 0.5:
            x = torch.full(shape, self.choose.choice([-float("inf"), torch.finfo(dtype).min, 1.5]))
        diagonal = self.choose.choice([self.small(), self.small(), keys - rows])
        x = self.choose.choice([torch.tril, torch.triu])(x, diagonal=diagonal)
        return self.choose.choice([lambda: x.bool(), lambda: x == 0, lambda: x != 0, lambda: x >= 0])()

    def leaf(self, rows, keys):
        return self.choose.choice(
            [
                lambda: self.padding[:, None, None, :keys],
                lambda: self.padding[:, :keys][:, None, None].expand(-1, 1, rows, -1),
                lambda: self.padding[0, :keys],
                lambda: self.padding[torch.arange(self.batch)[:, None, None, None], torch.arange(keys)],
            ]
        )()

    def constant(self, rows, keys):
        return torch.full((rows, keys), self.choose.choice([True, False]))

    def ids_equal(self, rows, keys):
        return self.ids[:, None, : self.choose.choice([rows, 1]), None] == self.ids[:, None, None, :keys]
