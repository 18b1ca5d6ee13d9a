"""Masks that programs build from positions, by what they mean; and how one becomes attention."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

ROWS, KEYS, BATCH, HEADS = 6, 9, 2, 4
bool_, inf = torch.bool, float("inf")


def ones(rows, keys, **kwargs):
    return torch.ones(rows, keys, dtype=bool_, **kwargs)


def i_(rows):
    return torch.arange(rows)[:, None]


def j_(keys):
    return torch.arange(keys)[None, :]


def tensors(rows=ROWS, keys=KEYS):
    query, key = torch.randn(BATCH, HEADS, rows, 8), torch.randn(BATCH, HEADS, keys, 8)
    padding = torch.ones(BATCH, keys, dtype=bool_)
    padding[1, keys - keys // 3 :] = False
    return query, key, padding


def attend(make):
    """Attention with a mask that `make(rows, keys)` or `make(rows, keys, padding)` builds inside the graph."""
    extra = make.__code__.co_argcount == 3

    def function(query, key, padding):
        sizes = query.shape[2], key.shape[2]
        mask = make(*sizes, padding) if extra else make(*sizes)
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    return function


TOP_LEFT = {
    "tril of ones": lambda m, n: torch.tril(ones(m, n)),
    "tril of float ones": lambda m, n: torch.tril(torch.ones(m, n)).bool(),
    "tril of half ones == 1": lambda m, n: torch.tril(torch.ones(m, n, dtype=torch.float16)) == 1,
    "tril of uint8": lambda m, n: torch.ones(m, n, dtype=torch.uint8).tril().bool(),
    "triu(1) == 0": lambda m, n: torch.triu(torch.ones(m, n), 1) == 0,
    "~triu(1)": lambda m, n: ~torch.triu(ones(m, n), 1),
    "triu of -inf == 0": lambda m, n: torch.full((m, n), -inf).triu(1) == 0,
    "triu of the smallest float > -1": lambda m, n: torch.full((m, n), torch.finfo(torch.float32).min).triu(1) > -1,
    "1 - triu(1)": lambda m, n: (1 - torch.ones(m, n).triu(1)).bool(),
    "transposed triu": lambda m, n: torch.triu(ones(n, m)).transpose(0, 1),
    "j <= i": lambda m, n: j_(n) <= i_(m),
    "i >= j": lambda m, n: i_(m) >= j_(n),
    "not j > i": lambda m, n: torch.logical_not(j_(n) > i_(m)),
    "j < i + 1": lambda m, n: j_(n) < i_(m) + 1,
    "j - i <= 0": lambda m, n: j_(n) - i_(m) <= 0,
    "2j <= 2i + 1": lambda m, n: 2 * j_(n) <= 2 * i_(m) + 1,
    "int32 positions": lambda m, n: torch.arange(n, dtype=torch.int32) <= torch.arange(m, dtype=torch.int32)[:, None],
    "int32 and int64": lambda m, n: torch.arange(n, dtype=torch.int32) <= i_(m),
    "cumsum of ones": lambda m, n: torch.ones(n, dtype=int).cumsum(0) <= torch.ones(m, dtype=int).cumsum(0)[:, None],
    "both from one": lambda m, n: torch.arange(1, n + 1) <= torch.arange(1, m + 1)[:, None],
    "sliced arange": lambda m, n: torch.arange(n + 2)[2:] <= torch.arange(m + 2)[2:, None],
    "masked_fill": lambda m, n: ones(m, n).masked_fill(j_(n) > i_(m), False),
    "where": lambda m, n: torch.where(j_(n) > i_(m), False, True),
    "where of numbers": lambda m, n: torch.where(j_(n) > i_(m), 0, 1).bool(),
    "sliced square": lambda m, n: torch.tril(ones(32, 32))[:m, :n],
    "sliced 4-D square": lambda m, n: torch.tril(ones(32, 32)).view(1, 1, 32, 32)[:, :, :m, :n],
    "indexed square": lambda m, n: torch.tril(ones(32, 32))[torch.arange(m)[:, None], torch.arange(n)],
    "rows by index_select": lambda m, n: torch.tril(ones(32, n)).index_select(0, torch.arange(m)),
    "through int": lambda m, n: (j_(n) <= i_(m)).to(torch.int32).to(bool_),
    "expanded": lambda m, n: (j_(n) <= i_(m))[None, None].expand(BATCH, HEADS, m, n),
    "with true": lambda m, n: (j_(n) <= i_(m)) & ones(m, n),
    "twice": lambda m, n: torch.tril(ones(m, n)) & (j_(n) <= i_(m)),
    "minimum": lambda m, n: j_(n) <= torch.minimum(i_(m), i_(m) + 3),
    "maximum": lambda m, n: j_(n) <= torch.maximum(i_(m), i_(m) - 3),
    "second of a minimum": lambda m, n: j_(n) <= torch.minimum(i_(m) + 3, i_(m)),
    "second of a maximum": lambda m, n: j_(n) <= torch.maximum(i_(m) - 3, i_(m)),
    "clamped from below": lambda m, n: (j_(n) - i_(m)).clamp(min=0) <= 0,
    "clamped from above": lambda m, n: (i_(m) - j_(n)).clamp(max=0) >= 0,
    "flipped twice": lambda m, n: torch.tril(ones(m, n)).flip(0).flip(0),
    "rolled and back": lambda m, n: torch.tril(ones(m, n)).roll(2, 0).roll(-2, 0),
    "rolled all the way": lambda m, n: torch.tril(ones(m, n)).roll(m, -2),
    "gathered": lambda m, n: torch.tril(ones(m, n)).gather(1, torch.arange(n)[None].expand(m, n)),
    "split": lambda m, n: torch.cat(torch.tril(ones(m, n)).split(2)[: (m + 1) // 2]),
    "split by sizes": lambda m, n: torch.cat(torch.tril(ones(m, n)).split([1, m - 1])),
    "chunked": lambda m, n: torch.cat(torch.tril(ones(m, n)).chunk(2, -1), -1),
    "unbound": lambda m, n: torch.stack([torch.triu(ones(m, n)), torch.tril(ones(m, n))]).unbind()[1],
    "unbound positions": lambda m, n: j_(n) <= torch.stack([i_(m), i_(m) + 1], 1).unbind(1)[0],
    "stacked": lambda m, n: torch.stack([torch.triu(ones(m, n)), torch.tril(ones(m, n))], 1)[:, 1],
    "written into": lambda m, n: ones(m, n).slice_scatter(torch.tril(ones(m, n)), 0, 0, m),
    "a row written into": lambda m, n: torch.tril(ones(m, n)) & ones(m, n).select_scatter(torch.arange(n) >= 0, 0, -1),
    "of chunks and places in them": lambda m, n: (j_(n) // 4) * 4 + j_(n) % 4 <= i_(m) - (i_(m) % 3) + i_(m) % 3,
    "multiples divided": lambda m, n: (4 * j_(n) + 3) // 4 <= (8 * i_(m) + 5) % 8 - 5 + i_(m),
    "float32 positions": lambda m, n: torch.arange(n).float() <= torch.arange(m)[:, None].float(),
    "float32 arange": lambda m, n: torch.arange(n, dtype=torch.float32) - torch.arange(m)[:, None] <= 0.0,
    "float64 positions": lambda m, n: torch.arange(n).double() <= torch.arange(m)[:, None].double(),
    "half positions": lambda m, n: torch.arange(2040, 2040 + n).half() <= torch.arange(m)[:, None].half() + 2040,
    "not an or": lambda m, n: ~((j_(n) > i_(m)) | (j_(n) < 0)),
    "less or equal by parts": lambda m, n: (j_(n) < i_(m)) | (j_(n) == i_(m)),
    "packed with arange positions": lambda m, n: (
        (
            (torch.diff(torch.arange(m), prepend=torch.tensor([-1]) * 0 + torch.arange(1) - 1) != 1).cumsum(0)[:, None]
            >= 0
        )
        & (j_(n) <= i_(m))
    ),
}

BOTTOM_RIGHT = {
    "tril(n - m)": lambda m, n: torch.tril(ones(m, n), diagonal=n - m),
    "~triu(n - m + 1)": lambda m, n: ~torch.triu(ones(m, n), n - m + 1),
    "positions after a cache": lambda m, n: j_(n) <= i_(m) + (n - m),
    "arange from the cache length": lambda m, n: j_(n) <= torch.arange(n - m, n)[:, None],
    "keys counted from behind": lambda m, n: j_(n) - n <= i_(m) - m,
    "last rows of a square": lambda m, n: torch.tril(ones(n, n))[n - m :],
    "prefix beside a triangle": lambda m, n: torch.cat([ones(m, n - m), torch.tril(ones(m, m))], dim=-1),
}

WINDOWS = {
    "i - j < 3": (lambda m, n: i_(m) - j_(n) < 3, "band(-2, inf)"),
    "i - j <= 3": (lambda m, n: i_(m) - j_(n) <= 3, "band(-3, inf)"),
    "j > i - 3": (lambda m, n: j_(n) > i_(m) - 3, "band(-2, inf)"),
    "j < i + 3": (lambda m, n: j_(n) < i_(m) + 3, "band(-inf, 2)"),
    "|i - j| < 3": (lambda m, n: (i_(m) - j_(n)).abs() < 3, "band(-2, 2)"),
    "window & causal": (lambda m, n: (i_(m) - j_(n) < 3) & (j_(n) <= i_(m)), "band(-2, 0)"),
    "triu & tril": (lambda m, n: ones(m, n).tril(1).triu(-2), "band(-2, 1)"),
    "difference of triangles": (lambda m, n: ones(m, n).tril() ^ ones(m, n).tril(-3), "band(-2, 0)"),
    "cumsum against arange": (lambda m, n: torch.ones(n, dtype=int).cumsum(0) <= i_(m), "band(-inf, -1)"),
    "diagonal": (lambda m, n: i_(m) == j_(n), "band(0, 0)"),
    "next": (lambda m, n: i_(m) + 1 == j_(n), "band(1, 1)"),
    "tighter of two": (lambda m, n: (j_(n) <= i_(m) + 2) & (j_(n) <= i_(m) + 1), "band(-inf, 1)"),
    "wider of two": (lambda m, n: (j_(n) <= i_(m) + 2) | (j_(n) <= i_(m) + 1), "band(-inf, 2)"),
    "not outside": (lambda m, n: ~((j_(n) > i_(m) + 1) | (j_(n) < i_(m) - 2)), "band(-2, 1)"),
}

ALWAYS = {
    "ones": lambda m, n: ones(m, n),
    "j >= 0": lambda m, n: (j_(n) >= 0).expand(m, n),
    "j < n": lambda m, n: (j_(n) < n).expand(m, n),
    "j <= i + n": lambda m, n: j_(n) <= i_(m) + n,
    "i - j < m": lambda m, n: i_(m) - j_(n) < m,
    "nothing written over": lambda m, n: ones(m, n).slice_scatter(torch.zeros(0, n, dtype=bool_), 0, 1, 1),
    "a or not a": lambda m, n: (j_(n) <= i_(m)) | (j_(n) > i_(m)),
}

PADDINGS = {
    "unsqueezed": lambda m, n, p: p[:, None, None, :],
    "viewed": lambda m, n, p: p.view(p.shape[0], 1, 1, n),
    "expanded": lambda m, n, p: p[:, None, None, :].expand(p.shape[0], HEADS, m, n),
    "unsqueezed after expanding": lambda m, n, p: p[:, None, :].expand(p.shape[0], m, n).unsqueeze(1),
    "and true": lambda m, n, p: p[:, None, None, :] & ones(m, n),
    "indexed": lambda m, n, p: p[torch.arange(p.shape[0])[:, None, None, None], torch.arange(n)].expand(-1, -1, m, n),
    "filled": lambda m, n, p: torch.ones(p.shape[0], 1, m, n, dtype=bool_).masked_fill(~p[:, None, None], False),
    "chosen": lambda m, n, p: torch.where(p[:, None, None], ones(m, n), False),
}

CAUSAL_AND_PADDING = {
    "and": lambda m, n, p: (j_(n) <= i_(m)) & p[:, None, None, :],
    "then unsqueezed": lambda m, n, p: ((j_(n) <= i_(m)) & p[:, None, :]).unsqueeze(1),
    "then sliced": lambda m, n, p: ((j_(n) <= i_(m + 2)) & p[:, None, None, :])[:, :, :m, :],
    "not or": lambda m, n, p: ~(torch.triu(ones(m, n), 1) | ~p[:, None, None, :]),
    "filled": lambda m, n, p: torch.tril(ones(m, n))[None, None].masked_fill(~p[:, None, None, :], False),
    "where": lambda m, n, p: torch.where(p[:, None, None, :], torch.tril(ones(m, n)), False),
    "product": lambda m, n, p: torch.tril(ones(m, n)) * p[:, None, None, :],
}

KEPT = {
    "every second": (lambda m, n: (i_(m) - j_(n)) % 2 == 0, (m_n := (ROWS, KEYS))),
    "slope 2": (lambda m, n: j_(n) <= 2 * i_(m), m_n),
    "slope -1": (lambda m, n: j_(n) <= 3 - i_(m), m_n),
    "flipped rows": (lambda m, n: torch.tril(ones(m, n)).flip(0), m_n),
    "off the diagonal": (lambda m, n: i_(m) != j_(n), m_n),
    "two bands": (lambda m, n: (j_(n) <= i_(m) - 3) | (j_(n) >= i_(m) + 3), m_n),
    "a window known at run time": (lambda m, n, p: i_(m) - j_(n) < p.sum(), m_n),
    "float positions": (lambda m, n: torch.arange(n) / 2 <= torch.arange(m)[:, None] / 2, m_n),
    "half positions": (lambda m, n: torch.arange(2045, n + 2045).half() <= torch.arange(m)[:, None].half() + 2045, m_n),
    "bfloat16 positions": (lambda m, n: torch.arange(n).bfloat16() + 255 <= torch.arange(m)[:, None] + 255, m_n),
    "rolled": (lambda m, n: torch.tril(ones(m, n)).roll(1, 0), m_n),
    "rolled along both": (lambda m, n: torch.tril(ones(m, n)).roll((1, 2), (0, 1)), m_n),
    "rolled as one row": (lambda m, n: torch.tril(ones(m, n)).roll(n), m_n),
    "gathered in order of data": (
        lambda m, n, p: torch.tril(ones(m, n)).gather(1, (p[:1].long() + j_(n) * 0).expand(m, n)),
        m_n,
    ),
    "gathered backwards": (lambda m, n: torch.tril(ones(m, n)).gather(1, (n - 1 - j_(n)).expand(m, n)), m_n),
    "split and turned": (lambda m, n: torch.cat(torch.tril(ones(m, n)).split([1, m - 1])[::-1]), m_n),
    "stacked and mixed": (
        lambda m, n: torch.stack([torch.tril(ones(m, n)), torch.tril(ones(m, n), 2)], 1).view(2 * m, n)[:m],
        m_n,
    ),
    "a row written over": (lambda m, n: torch.tril(ones(m, n)).select_scatter(torch.arange(n) >= 0, 0, 1), m_n),
    "rows written over": (lambda m, n: torch.tril(ones(m, n)).slice_scatter(ones(2, n), 0, 1, 3), m_n),
    "in another shape": (lambda m, n: torch.tril(ones(n, m)).reshape(m, n), m_n),
    "int32 overflow": (lambda m, n: (i_(m).int() - j_(n).int()) * 2**30 >= 0, m_n),
    "int32 against a number it cannot hold": (lambda m, n: (i_(m) - j_(n)).int() < torch.tensor(2**40) + 3, m_n),
    "uint8 difference": (lambda m, n: i_(m).to(torch.uint8) - j_(n).to(torch.uint8) >= 0, m_n),
    "indices from behind": (lambda m, n: torch.tril(ones(m, n))[torch.arange(m)[:, None] - 1, torch.arange(n)], m_n),
    "gathered by data": (lambda m, n, p: torch.tril(ones(m, n))[:, p[0].long()], m_n),
    "cumsum of data": (lambda m, n, p: j_(n) <= i_(m) + p.cumsum(1)[:1, :1], m_n),
    "truncated multiples": (lambda m, n: torch.div(4 * (j_(n) - i_(m)) - 1, 4, rounding_mode="trunc") <= -1, m_n),
    "remainders of the dividend's sign": (lambda m, n: torch.fmod(4 * (j_(n) - i_(m)) - 1, 4) == 3, m_n),
    "truncated division": (lambda m, n: torch.div(j_(n) - i_(m), 2, rounding_mode="trunc") <= 0, m_n),
}


NAMED = {
    "prefix": (lambda m, n: (j_(n) <= i_(m)) | (j_(n) < 4), "prefix"),
    "prefix of data": (lambda m, n, p: (j_(n) <= i_(m)) | (j_(n) < p.sum(1)[:, None, None, None]), "prefix"),
    "end": (lambda m, n: (j_(n) <= i_(m)) | (j_(n) > 4), "tensor"),
    "prefix or rows": (lambda m, n: (j_(n) <= i_(m)) | (i_(m) < 4), "tensor"),
    "chunks": (lambda m, n: i_(m) // 3 == j_(n) // 3, "chunks"),
    "chunks after a cache": (lambda m, n: (i_(m) + (n - m)) // 3 - j_(n) // 3 == 0, "chunks"),
    "other chunks": (lambda m, n: i_(m) // 3 != j_(n) // 3, "tensor"),
    "block causal": (lambda m, n: i_(m) // 3 >= j_(n) // 3, "tensor"),
    "residues of the distance": (lambda m, n: (i_(m) - j_(n)) % 3 == 0, "tensor"),
    "causal chunks": (lambda m, n: (i_(m) // 3 == j_(n) // 3) & (j_(n) <= i_(m)), "causal & chunks"),
    "documents": (lambda m, n, p: p.cumsum(1)[:, None, :m, None] == p.cumsum(1)[:, None, None], "documents"),
    "other documents": (lambda m, n, p: p.cumsum(1)[:, None, :m, None] != p.cumsum(1)[:, None, None], "tensor"),
    "neighbours of data": (lambda m, n, p: p.cumsum(1)[:, None, None] == (i_(m) - j_(n)) // 2, "tensor"),
    "causal documents": (
        lambda m, n, p: (p.cumsum(1)[:, None, :m, None] == p.cumsum(1)[:, None, None]) & (j_(n) <= i_(m)),
        "causal & documents",
    ),
    "causal documents and padding": (
        lambda m, n, p: (
            (p.cumsum(1)[:, None, :m, None] == p.cumsum(1)[:, None, None]) & (j_(n) <= i_(m)) & p[:, None, None]
        ),
        "causal & documents & tensor",
    ),
}


def written_in_place(m, n):
    mask = torch.tril(ones(m, n))
    mask[0, :] = True
    return mask


KEPT["mutated in place"] = (written_in_place, m_n)

ODD = {
    "scalar": (lambda m, n: torch.ones((), dtype=bool_), "full"),
    "rank 1": (lambda m, n: torch.arange(n) >= 0, "full"),
    "5-D on the way": (lambda m, n: torch.ones(1, 1, 1, m, n, dtype=bool_).tril()[0], "causal"),
    "none among indices": (lambda m, n: ones(m, n).tril()[:, torch.arange(n)], "causal"),
    "bool indices": (lambda m, n: ones(m, n).tril()[torch.ones(m, dtype=bool_)][:m], "tensor"),
    "complex": (lambda m, n: torch.ones(m, n, dtype=torch.complex64).tril().real == 1, "tensor"),
    "empty part": (lambda m, n: torch.cat([torch.ones(0, dtype=bool_), ones(m, n).tril()], 1), "causal"),
    "bools beside numbers": (lambda m, n: torch.cat([ones(m, 1).long() * 2, ones(m, n - 1)], 1) == 1, "tensor"),
    "where of a bool and a number": (lambda m, n: torch.where(j_(n) <= i_(m), ones(m, n), 2) == 2, "band(1, inf)"),
    "0-d cumsum": (lambda m, n: (torch.ones((), dtype=int).cumsum(0) > 5).expand(m, n), "tensor"),
    "nested sums": (lambda m, n: ones(m, n).cumsum(0).cumsum(1) > i_(m) * n + 100, "tensor"),
    "not a number": (lambda m, n: torch.full((m, n), float("nan")).tril() == 0, "tensor"),
    "0 * inf": (lambda m, n: ones(m, n).tril().float() * inf > 0, "tensor"),
    "division by a negative number": (lambda m, n: (j_(n) // 2) // -2 <= 0, "tensor"),
    "window of the largest integer": (lambda m, n: i_(m) - j_(n) < sys.maxsize, "full"),
}
