"""Masks built from positions become a band, and nothing that is not proved does."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from compiled_report import ATTENTION, compiled
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.passes import mask as mask_pass
from sgl_npu.passes.mask import MaskProver, Match
from sgl_npu.passes.site import Refusal, find_sites, mask_text

ROWS, KEYS, BATCH, HEADS = 6, 9, 2, 4
bool_, inf = torch.bool, float("inf")


def ones(rows, keys, **kwargs):
    return torch.ones(rows, keys, dtype=bool_, **kwargs)


def i_(rows):
    return torch.arange(rows)[:, None]


def j_(keys):
    return torch.arange(keys)[None, :]


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of the mask tensors that the prover leaves behind, None where none is left."""
    found = []
    original = MaskProver.rewrite

    def rewrite(self, match):
        original(self, match)
        mask = match.site.tensor("mask")
        found.append(None if mask is None else tuple(mask.shape))

    monkeypatch.setattr(mask_pass.MaskProver, "rewrite", rewrite)
    torch.manual_seed(0)
    return found


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


def masks(reports):
    return [site.mask for report in reports for site in report.sites]


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
    "clamped from below": lambda m, n: (j_(n) - i_(m)).clamp(min=0) <= 0,
    "clamped from above": lambda m, n: (i_(m) - j_(n)).clamp(max=0) >= 0,
    "flipped twice": lambda m, n: torch.tril(ones(m, n)).flip(0).flip(0),
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
    "prefix": (lambda m, n: (j_(n) <= i_(m)) | (j_(n) < 4), (m_n := (ROWS, KEYS))),
    "chunks": (lambda m, n: i_(m) // 3 == j_(n) // 3, m_n),
    "every second": (lambda m, n: (i_(m) - j_(n)) % 2 == 0, m_n),
    "documents": (lambda m, n, p: p.cumsum(1)[:, None, :m, None] == p.cumsum(1)[:, None, None], (BATCH, 1, ROWS, KEYS)),
    "slope 2": (lambda m, n: j_(n) <= 2 * i_(m), m_n),
    "slope -1": (lambda m, n: j_(n) <= 3 - i_(m), m_n),
    "flipped rows": (lambda m, n: torch.tril(ones(m, n)).flip(0), m_n),
    "off the diagonal": (lambda m, n: i_(m) != j_(n), m_n),
    "two bands": (lambda m, n: (j_(n) <= i_(m) - 3) | (j_(n) >= i_(m) + 3), m_n),
    "a window known at run time": (lambda m, n, p: i_(m) - j_(n) < p.sum(), m_n),
    "float positions": (lambda m, n: torch.arange(n) / 2 <= torch.arange(m)[:, None] / 2, m_n),
    "float32 positions": (lambda m, n: torch.arange(n).float() <= torch.arange(m)[:, None].float(), m_n),
    "int32 overflow": (lambda m, n: (i_(m).int() - j_(n).int()) * 2**30 >= 0, m_n),
    "int32 against a number it cannot hold": (lambda m, n: (i_(m) - j_(n)).int() < torch.tensor(2**40) + 3, m_n),
    "uint8 difference": (lambda m, n: i_(m).to(torch.uint8) - j_(n).to(torch.uint8) >= 0, m_n),
    "indices from behind": (lambda m, n: torch.tril(ones(m, n))[torch.arange(m)[:, None] - 1, torch.arange(n)], m_n),
    "gathered by data": (lambda m, n, p: torch.tril(ones(m, n))[:, p[0].long()], m_n),
    "cumsum of data": (lambda m, n, p: j_(n) <= i_(m) + p.cumsum(1)[:1, :1], m_n),
    "truncated division": (lambda m, n: torch.div(j_(n) - i_(m), 2, rounding_mode="trunc") <= 0, m_n),
}


def written_in_place(m, n):
    mask = torch.tril(ones(m, n))
    mask[0, :] = True
    return mask


KEPT["mutated in place"] = (written_in_place, m_n)


def by_name(table):
    return pytest.mark.parametrize("make", table.values(), ids=table.keys())


DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@by_name(TOP_LEFT)
def test_top_left_causal(make, shapes):
    assert masks(compiled(attend(make), *tensors(), platform="cpu")) == ["causal"]
    assert shapes == [None]


@by_name(BOTTOM_RIGHT)
@DYNAMIC
def test_bottom_right_causal(make, dynamic, shapes):
    reports = compiled(attend(make), *tensors(), platform="cpu", dynamic=dynamic)
    assert masks(reports) == ["causal (bottom-right)"]
    assert shapes == [None]


@pytest.mark.parametrize(("make", "text"), WINDOWS.values(), ids=WINDOWS.keys())
def test_windows_are_exact(make, text, shapes):
    assert masks(compiled(attend(make), *tensors(), platform="cpu")) == [text]
    assert shapes == [None]


@by_name(ALWAYS)
@DYNAMIC
def test_a_mask_that_always_holds_vanishes(make, dynamic, shapes):
    assert masks(compiled(attend(make), *tensors(), platform="cpu", dynamic=dynamic)) == ["full"]
    assert shapes == [None]


def test_a_mask_that_never_holds_stays(shapes):
    for make in (lambda m, n: torch.zeros(m, n, dtype=bool_), lambda m, n: j_(n) > i_(m) + n):
        assert masks(compiled(attend(make), *tensors(), platform="cpu")) == ["tensor"]
    assert shapes == [(1, 1, 1, 1)]


@by_name(PADDINGS)
def test_padding_stays_as_small_as_it_is(make, shapes):
    assert masks(compiled(attend(make), *tensors(), platform="cpu")) == ["tensor"]
    assert shapes in ([], [(BATCH, 1, 1, KEYS)])


@by_name(CAUSAL_AND_PADDING)
@DYNAMIC
def test_causal_and_padding_come_apart(make, dynamic, shapes):
    assert masks(compiled(attend(make), *tensors(), platform="cpu", dynamic=dynamic)) == ["causal & tensor"]
    (shape,) = shapes
    assert [str(size) for size in shape[1:3]] == ["1", "1"]


def test_window_causal_and_padding(shapes):
    def make(m, n, p):
        return (j_(n) <= i_(m)) & (i_(m) - j_(n) < 4) & p[:, None, None, :]

    assert masks(compiled(attend(make), *tensors(), platform="cpu")) == ["band(-3, 0) & tensor"]
    assert shapes == [(BATCH, 1, 1, KEYS)]


@pytest.mark.parametrize(("make", "shape"), KEPT.values(), ids=KEPT.keys())
def test_what_is_no_band_stays_a_tensor(make, shape, shapes):
    reports = compiled(attend(make), *tensors(), platform="cpu")
    assert masks(reports) == ["tensor"]
    assert shapes in ([], [shape])


def test_a_causal_mask_from_an_input_stays_a_tensor():
    query, key, _ = tensors()

    def function(query, key, mask):
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    assert masks(compiled(function, query, key, ones(ROWS, KEYS).tril(), platform="cpu")) == ["tensor"]


def test_a_causal_mask_from_a_buffer_stays_a_tensor():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("causal", ones(16, 16).tril())

        def forward(self, query, key):
            mask = self.causal[: query.shape[2], : key.shape[2]]
            return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    assert masks(compiled(Model(), *tensors()[:2], platform="cpu")) == ["tensor"]


@pytest.mark.parametrize(("rows", "keys"), [(1, 9), (9, 1), (1, 1), (5, 5), (9, 6)])
@pytest.mark.parametrize("table", [TOP_LEFT, WINDOWS, KEPT], ids=["causal", "windows", "kept"])
def test_any_lengths_keep_the_values(rows, keys, table):
    names = [name for name in table if name not in ("indices from behind", "gathered by data", "documents")]
    for name in names[::4]:
        make = table[name] if table is TOP_LEFT else table[name][0]
        compiled(attend(make), *tensors(rows, keys), platform="cpu")


def test_decoding_sees_the_whole_cache():
    make = BOTTOM_RIGHT["positions after a cache"]
    assert masks(compiled(attend(make), *tensors(1, 9), platform="cpu")) == ["full"]


def test_one_graph_serves_every_length():
    import sgl_npu

    function = attend(lambda m, n, p: (j_(n) <= i_(m) + (n - m)) & p[:, None, None, :])
    torch._dynamo.reset()
    compiled_function = torch.compile(function, backend="sgl_npu", options={"inner": "eager", "strict": True})
    before = len(sgl_npu.reports())
    for rows, keys in ((5, 9), (4, 7), (8, 30)):
        arguments = tensors(rows, keys)
        torch._dynamo.mark_dynamic(arguments[0], 2)
        for x, dim in ((arguments[1], 2), (arguments[2], 1)):
            torch._dynamo.mark_dynamic(x, dim)
        with torch.no_grad():
            torch.testing.assert_close(compiled_function(*arguments), function(*arguments))
    (report,) = sgl_npu.reports()[before:]
    assert masks([report]) == ["causal (bottom-right) & tensor"]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_mask_that_the_band_says_all_of_leaves_the_graph(inner):
    function = attend(TOP_LEFT["triu(1) == 0"])
    (report,) = compiled(function, *tensors(11, 11), platform="cpu", inner=inner)
    assert masks([report]) == ["causal"]
    assert "11, 11]" not in report.graph


def test_layers_share_what_is_left_of_their_mask(shapes):
    def function(query, key, padding):
        mask = (j_(key.shape[2]) <= i_(query.shape[2])) & ~(~padding)[:, None, None, :].expand(-1, 1, ROWS, -1)
        for _ in range(2):
            query = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        return query

    (report,) = compiled(function, *tensors(), platform="npu")
    assert masks([report]) == ["causal & tensor"] * 2
    assert shapes == [(BATCH, 1, 1, KEYS)] * 2


INDUCTOR = {
    **{name: (TOP_LEFT[name], "causal") for name in ("tril of float ones", "triu of -inf == 0", "cumsum of ones")},
    "window": (WINDOWS["|i - j| < 3"][0], "band(-2, 2)"),
    "prefix beside a triangle": (BOTTOM_RIGHT["prefix beside a triangle"], "causal (bottom-right)"),
    "filled": (CAUSAL_AND_PADDING["filled"], "causal & tensor"),
    "chunks": (KEPT["chunks"][0], "tensor"),
}


@pytest.mark.parametrize(("make", "text"), INDUCTOR.values(), ids=INDUCTOR.keys())
def test_inductors_decompositions_prove_the_same(make, text):
    from torch._inductor.decomposition import select_decomp_table

    assert proved(make, select_decomp_table()) == text
    assert proved(make, {}) == text


def proved(make, decompositions=None, mode="symbolic", rows=ROWS, keys=KEYS):
    """What is left of a mask in a graph traced without the backend; no pass may raise."""
    extra = make.__code__.co_argcount == 3

    def function(query, key, padding):
        sizes = query.shape[2], key.shape[2]
        return ATTENTION(query, key, key, make(*sizes, padding) if extra else make(*sizes))[0]

    graph = make_fx(function, decompositions, tracing_mode=mode)(*tensors(rows, keys))
    (site,) = find_sites(graph.graph, {})
    prover = MaskProver()
    match = prover.match(site)
    if isinstance(match, Match):
        prover.rewrite(match)
        graph.graph.lint()
    else:
        assert isinstance(match, Refusal)
    return mask_text(site)


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


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("mode", ["symbolic", "fake"])
def test_odd_graphs_neither_raise_nor_lie(name, mode):
    make, text = ODD[name]
    assert proved(make, mode=mode) == text


def test_equal_masks_are_proved_once(monkeypatch):
    calls = []
    original = MaskProver._prove
    monkeypatch.setattr(MaskProver, "_prove", lambda self, *args: calls.append(args) or original(self, *args))

    def layers(query, key, padding):
        mask = (j_(key.shape[2]) <= i_(query.shape[2])) & padding[:, None, None, :]
        for _ in range(5):
            query = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        return query

    compiled(layers, *tensors(), platform="cpu")
    assert len(calls) == 2


# ---------------------------------------------------------------- transformers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
IDS = torch.arange(3, 23).view(2, 10)
PADDED = torch.ones(2, 10, dtype=torch.long)
PADDED[0, :3] = 0
MODELS = {
    "Llama": ("Llama", {}, {}, "causal"),
    "Llama padded": ("Llama", {}, {"attention_mask": PADDED}, "causal & tensor"),
    "Llama with a cache": ("Llama", {}, {"use_cache": True}, "causal"),
    "Llama with given positions": ("Llama", {}, {"position_ids": torch.arange(10).expand(2, -1)}, "tensor"),
    "Mistral": ("Mistral", {"sliding_window": 4}, {}, "band(-3, 0)"),
    "Mistral padded": ("Mistral", {"sliding_window": 4}, {"attention_mask": PADDED}, "band(-3, 0) & tensor"),
    "Gemma3": ("Gemma3Text", {"sliding_window": 4}, {}, "band(-3, 0)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "inputs", "text"), MODELS.values(), ids=MODELS.keys())
def test_masks_of_transformers(name, config, inputs, text):
    transformers = pytest.importorskip("transformers")
    settings = getattr(transformers, f"{name}Config")(**{**SMALL, **config})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(settings).eval()
    model.config._attn_implementation = "sdpa"

    def run(ids, kwargs):
        return model(input_ids=ids, **{"use_cache": False, **kwargs})[0]

    reports = compiled(run, IDS, inputs, platform="cpu")
    assert masks(reports) == [text] * 2
