"""Masks built from positions become a band, and nothing that is not proved does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_report import ATTENTION, compiled, only_site
from mask_cases import (
    ALWAYS,
    BATCH,
    BOTTOM_RIGHT,
    CAUSAL_AND_PADDING,
    KEPT,
    KEYS,
    NAMED,
    ODD,
    PADDINGS,
    ROWS,
    TOP_LEFT,
    WINDOWS,
    attend,
    bool_,
    i_,
    j_,
    ones,
    tensors,
    written_in_place,
)
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.passes import mask as mask_pass
from sgl_npu.passes.mask import MaskProver, Match
from sgl_npu.passes.site import Refusal, find_sites, mask_text


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


def masks(reports):
    return [site.mask for report in reports for site in report.sites]


def by_name(table):
    return pytest.mark.parametrize("make", table.values(), ids=table.keys())


FEW_POSITIONS = ("float32 positions", "float32 arange", "half positions")  # a float dtype holds so many of them
ODD_LENGTHS = ("split", "chunked")  # are cut at lengths that only tracing through Dynamo keeps symbolic

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
    if make is not written_in_place:  # only AOTAutograd turns writes into values
        assert proved(make) == "tensor"


@pytest.mark.parametrize(("make", "text"), NAMED.values(), ids=NAMED.keys())
@DYNAMIC
def test_what_is_no_band_has_a_name(make, text, dynamic):
    assert masks(compiled(attend(make), *tensors(), platform="cpu", dynamic=dynamic)) == [text]


@pytest.mark.parametrize("name", [name for name in TOP_LEFT if name not in ODD_LENGTHS])
def test_top_left_causal_of_any_length(name):
    text = "tensor" if name in FEW_POSITIONS else "causal"
    assert proved(TOP_LEFT[name], mode="symbolic") == text


def test_a_causal_mask_from_an_input_stays_a_tensor():
    query, key, _ = tensors()

    def function(query, key, mask):
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    assert masks(compiled(function, query, key, ones(ROWS, KEYS).tril(), platform="cpu")) == ["tensor"]


def test_a_causal_mask_from_a_buffer_is_causal():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("causal", ones(16, 16).tril())

        def forward(self, query, key):
            mask = self.causal[: query.shape[2], : key.shape[2]]
            return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    assert masks(compiled(Model(), *tensors()[:2], platform="cpu")) == ["causal"]


@pytest.mark.parametrize(("rows", "keys"), [(1, 9), (9, 1), (1, 1), (5, 5), (9, 6)])
@pytest.mark.parametrize("table", [TOP_LEFT, WINDOWS, KEPT], ids=["causal", "windows", "kept"])
def test_any_lengths_keep_the_values(rows, keys, table):
    names = [name for name in table if name not in ("indices from behind", "gathered by data", "split by sizes")]
    functions = [attend(table[name] if table is TOP_LEFT else table[name][0]) for name in names[::4]]

    def answers(*inputs):
        return [function(*inputs) for function in functions]

    compiled(answers, *tensors(rows, keys), platform="cpu")


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
    "chunks": (NAMED["chunks"][0], "chunks"),
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
    prover.describe(site, match)
    if isinstance(match, Match):
        prover.rewrite(match)
        graph.graph.lint()
    else:
        assert isinstance(match, Refusal)
    return mask_text(site)


def test_bounds_that_only_some_lengths_put_in_order_are_not_merged():
    def both(m, n):
        return (j_(n) <= i_(m)) & (j_(n) <= i_(m) + (n - m))

    assert proved(both, mode="fake") == "causal"
    assert proved(both, mode="fake", rows=9, keys=6) == "causal (bottom-right)"
    assert proved(both, mode="symbolic") == "causal & tensor"


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


def test_a_mask_behind_an_op_with_several_results_stays_a_tensor():
    def pooled_mask(q, k, v, padding):
        pooled, _ = torch.nn.functional.max_pool1d(padding[:, None], 1, 1, return_indices=True)
        scores = (q @ k.mT).masked_fill(pooled[:, None] < 0.5, -1e9)
        return scores.softmax(-1) @ v

    q, padding = torch.randn(2, 3, 6, 8), torch.ones(2, 6)
    padding[1, 4:] = 0.0
    assert only_site(compiled(pooled_mask, q, q, q, padding, platform="cpu")).mask == "tensor"
