"""Whether a row of a mask may be left without a key."""

from __future__ import annotations

import pytest
import torch
from compiled_report import ATTENTION, compiled, only_site
from mask_cases import attend, bool_, i_, j_, ones, tensors
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.compiler.report_table import render
from sgl_npu.passes.mask import MaskProver
from sgl_npu.passes.mask_parts import Part
from sgl_npu.passes.site import find_sites


def ids_equal(m, n, p):
    ids = p.cumsum(1)
    return ids[:, None, :m, None] == ids[:, None, None]


def after_cache(m, n):
    return j_(n) <= i_(m) + (n - m)


def last_ids_equal(m, n, p):
    ids = p.cumsum(1)
    return ids[:, None, n - m :, None] == ids[:, None, None]


def draws_equal(m, n, p):
    one, other = (torch.bernoulli(p.float()).long() for _ in range(2))
    return (one[:, None, :m, None] == other[:, None, None]) & (j_(n) <= i_(m))


FEWER_ROWS, AS_MANY, MORE_ROWS = (6, 9), (6, 6), (9, 6)
EMPTY_ROWS = {
    # mask: (of fewer rows than keys, of as many, of more)
    "none": (lambda m, n: ones(m, n), ("never", "never", "never")),
    "all": (lambda m, n: ~ones(m, n), ("some", "some", "some")),
    "causal": (lambda m, n: j_(n) <= i_(m), ("never", "never", "never")),
    "strictly causal": (lambda m, n: j_(n) < i_(m), ("some", "some", "some")),
    "causal after a cache": (after_cache, ("never", "never", "some")),
    "window": (lambda m, n: (i_(m) - j_(n)).abs() < 3, ("never", "never", "some")),
    "wide window": (lambda m, n: (i_(m) - j_(n)).abs() < 5, ("never", "never", "never")),
    "inverted window": (lambda m, n: (j_(n) <= i_(m) - 2) & (j_(n) >= i_(m) + 2), ("some", "some", "some")),
    "padding": (lambda m, n, p: p[:, None, None], ("possible", "possible", "possible")),
    "causal and padding": (
        lambda m, n, p: (j_(n) <= i_(m)) & p[:, None, None],
        ("possible", "possible", "possible"),
    ),
    "causal or padding": (lambda m, n, p: (j_(n) <= i_(m)) | p[:, None, None], ("never", "never", "never")),
    "strictly causal and padding": (lambda m, n, p: (j_(n) < i_(m)) & p[:, None, None], ("some", "some", "some")),
    "prefix": (lambda m, n, p: (j_(n) <= i_(m)) | (j_(n) < p.sum()), ("never", "never", "never")),
    "not the first key": (lambda m, n: (j_(n) <= i_(m)) & (j_(n) > 0), ("some", "some", "some")),
    "not in the second row": (lambda m, n: (i_(m) != 1).expand(m, n), ("possible", "possible", "possible")),
    "not in the last row": (lambda m, n: (i_(m) < m - 1).expand(m, n), ("some", "some", "some")),
    "chunks": (lambda m, n: i_(m) // 3 == j_(n) // 3, ("never", "never", "possible")),
    "causal chunks": (
        lambda m, n: (i_(m) // 3 == j_(n) // 3) & (j_(n) <= i_(m)),
        ("never", "never", "possible"),
    ),
    "causal chunks after a cache": (
        lambda m, n: ((i_(m) + (n - m)) // 3 == j_(n) // 3) & after_cache(m, n),
        ("never", "never", "some"),
    ),
    "causal documents": (lambda m, n, p: ids_equal(m, n, p) & (j_(n) <= i_(m)), ("never", "never", None)),
    "documents in a window": (
        lambda m, n, p: ids_equal(m, n, p) & ((i_(m) - j_(n)).abs() < 3),
        ("never", "never", None),
    ),
    "earlier keys of a document": (lambda m, n, p: ids_equal(m, n, p) & (j_(n) < i_(m)), ("some", "some", None)),
    "documents after a cache": (lambda m, n, p: last_ids_equal(m, n, p) & after_cache(m, n), ("never", "never", None)),
    "documents and padding": (lambda m, n, p: ids_equal(m, n, p) & p[:, None, None], ("possible", "possible", None)),
    "equal random numbers": (draws_equal, ("possible", "possible", None)),
    "documents of two kinds": (
        lambda m, n, p: p.cumsum(1)[:, None, :m, None] == p.int().cumsum(1)[:, None, None] + 1,
        ("possible", "possible", None),
    ),
}
CASES = {
    f"{name}, {rows} x {keys}": (make, rows, keys, expected[place])
    for name, (make, expected) in EMPTY_ROWS.items()
    for place, (rows, keys) in enumerate((FEWER_ROWS, AS_MANY, MORE_ROWS))
    if expected[place] is not None
}


def graph_of(make, rows, keys, mode="fake"):
    extra = make.__code__.co_argcount == 3

    def function(query, key, padding):
        sizes = query.shape[2], key.shape[2]
        mask = make(*sizes, padding) if extra else make(*sizes)
        return ATTENTION(query, key, key, mask)[0]

    return make_fx(function, tracing_mode=mode)(*tensors(rows, keys))


def said(make, rows, keys, mode="fake"):
    (site,) = find_sites(graph_of(make, rows, keys, mode).graph, {})
    prover = MaskProver()
    prover.describe(site, prover.match(site))
    return site.record.empty_rows


@pytest.mark.parametrize(("make", "rows", "keys", "expected"), CASES.values(), ids=CASES.keys())
def test_empty_rows(make, rows, keys, expected):
    assert said(make, rows, keys) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("causal", "never"),
        ("strictly causal", "some"),
        ("causal after a cache", "possible"),
        ("window", "possible"),
        ("causal and padding", "possible"),
        ("causal documents", "never"),
        ("causal chunks", "possible"),
        ("none", "never"),
    ],
)
def test_empty_rows_of_any_length(name, expected):
    assert said(EMPTY_ROWS[name][0], *FEWER_ROWS, mode="symbolic") == expected


@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_what_is_said_of_empty_rows_is_true(name):
    make, _ = EMPTY_ROWS[name]
    for rows, keys in (FEWER_ROWS, AS_MANY, (1, 9), (6, 1), (9, 6)):
        *_, padding = tensors(rows, keys)
        try:
            answer = said(make, rows, keys)
        except (RuntimeError, ValueError):  # a mask that is not made for more rows than keys
            continue
        arguments = (rows, keys, padding) if make.__code__.co_argcount == 3 else (rows, keys)
        empty = bool((~make(*arguments).expand(2, 1, rows, keys).any(-1)).any())
        assert {"never": not empty, "some": empty, "possible": True}[answer]


def test_a_condition_of_the_graph_can_be_asked_before_it_is_a_mask():
    graph = graph_of(lambda m, n: torch.where(j_(n) > i_(m), -1.0, 0.0) >= 0, *FEWER_ROWS)
    fill = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.where.self)
    condition = fill.args[0]
    prover = MaskProver()
    for shape in ((2, 4, 6, 9), (8, 6, 9), (6, 9), (2, 2, 2, 6, 9)):
        assert prover.empty_rows([Part(condition, negated=True)], shape) == "never"
        assert prover.empty_rows([Part(condition), Part(condition, negated=True)], shape) == "some"
        assert prover.empty_rows([], shape) == "never"
        assert prover.empty_rows([Part(condition, negated=True)], shape, unknown=True) == "possible"


def test_the_record_says_it_and_so_does_the_table():
    causal = compiled(attend(lambda m, n: j_(n) <= i_(m)), *tensors(), platform="cpu")
    assert only_site(causal).empty_rows == "never"
    assert "empty rows" not in render(causal[0], width=200)
    padded = compiled(attend(lambda m, n, p: (j_(n) <= i_(m)) & p[:, None, None]), *tensors(), platform="cpu")
    assert padded[0].to_dict()["sites"][0]["empty_rows"] == "possible"
    assert "causal & tensor (empty rows possible)" in render(padded[0], width=200)
    (some,) = compiled(attend(lambda m, n: torch.zeros(m, n, dtype=bool_)), *tensors(), platform="cpu")
    assert only_site([some]).empty_rows == "some"
