"""Float masks that are added to the scores become masks and bands where that changes nothing, and stay biases else."""

from __future__ import annotations

import pytest
import torch
from compiled_report import ATTENTION, compiled
from mask_cases import HEADS, attend, i_, inf, j_, ones, tensors
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.passes.mask import MaskProver, Match
from sgl_npu.passes.site import find_sites, mask_text

LOWEST = torch.finfo(torch.float32).min


def added(condition, forbidden=-inf):
    return torch.where(condition, 0.0, forbidden)


def alibi(m, n):
    return (j_(n) - i_(m)).abs() * -0.5


MASKS = {
    "where": (lambda m, n: added(j_(n) <= i_(m)), "causal"),
    "where not": (lambda m, n: torch.where(j_(n) > i_(m), -inf, 0.0), "causal"),
    "masked_fill": (lambda m, n: torch.zeros(m, n).masked_fill(j_(n) > i_(m), -inf), "causal"),
    "triu of -inf": (lambda m, n: torch.full((m, n), -inf).triu(1), "causal"),
    "a sum": (lambda m, n: added(j_(n) <= i_(m)) + added(i_(m) - j_(n) < 3), "band(-2, 0)"),
    "halved, expanded, sliced": (
        lambda m, n: added(j_(n + 1) <= i_(m))[None, None].half().expand(2, HEADS, m, n + 1)[..., :n],
        "causal",
    ),
    "one in another": (
        lambda m, n: added(j_(n) <= i_(m)).masked_fill(i_(m) - j_(n) >= 3, -inf),
        "band(-2, 0)",
    ),
    "zeros": (lambda m, n: torch.zeros(m, n), "full"),
    "padding": (lambda m, n, p: added(p)[:, None, None], "tensor"),
    "causal and padding": (lambda m, n, p: added((j_(n) <= i_(m)) & p[:, None, None]), "causal & tensor"),
    "causal plus padding": (lambda m, n, p: added(j_(n) <= i_(m)) + added(p)[:, None, None], "causal & tensor"),
    "documents": (
        lambda m, n, p: added(p.cumsum(1)[:, None, :m, None] == p.cumsum(1)[:, None, None]),
        "documents",
    ),
    "a mask and a bias": (lambda m, n: added(j_(n) <= i_(m)) + alibi(m, n), "causal + bias"),
    "a bias that is filled": (lambda m, n: torch.where(j_(n) <= i_(m), alibi(m, n), -inf), "causal + bias"),
}

FINITE = {
    "causal": (lambda m, n: added(j_(n) <= i_(m), LOWEST), "causal"),
    "triu": (lambda m, n: torch.full((m, n), LOWEST).triu(1), "causal"),
    "-1e9 times a triangle": (lambda m, n: torch.ones(m, n).triu(1) * -1e9, "causal"),
    "causal documents": (
        lambda m, n, p: added(
            (p.cumsum(1)[:, None, :m, None] == p.cumsum(1)[:, None, None]) & (j_(n) <= i_(m)), LOWEST
        ),
        "causal & documents",
    ),
}

BIASES = {
    "padding of a finite number": lambda m, n, p: added(p, LOWEST)[:, None, None],
    "one minus padding": lambda m, n, p: (1.0 - p[:, None, None].float()) * LOWEST,
    "causal and padding of a finite number": lambda m, n, p: added((j_(n) <= i_(m)) & p[:, None, None], LOWEST),
    "a first row without a key": lambda m, n: added(j_(n) < i_(m), LOWEST),
    "a bias under a finite number": lambda m, n: torch.where(j_(n) <= i_(m), alibi(m, n), LOWEST),
    "a number that forbids nothing": lambda m, n: added(j_(n) <= i_(m), -9000.0),
    "1 where allowed": lambda m, n: torch.where(j_(n) <= i_(m), 1.0, -inf).clamp(max=1.0),
    "a bias": alibi,
    "a bias that is cast": lambda m, n: (added(j_(n) <= i_(m)) + alibi(m, n)).half(),
    "a bias that is expanded": lambda m, n: torch.where(j_(n) <= i_(m), alibi(m, n), -inf).expand(2, HEADS, m, n),
    "not a number": lambda m, n: torch.where(j_(n) <= i_(m), 0.0, float("nan")),
    "data": lambda m, n, p: (p.sum() * -1e9).expand(m, n),
}

table = pytest.mark.parametrize


def proved(make, mode, rows=6, keys=9):
    """What is said of a bias in a graph; the rewritten graph must give the values of the one before."""
    extra = make.__code__.co_argcount == 3

    def function(query, key, padding):
        sizes = query.shape[2], key.shape[2]
        bias = make(*sizes, padding) if extra else make(*sizes)
        return ATTENTION(query, key, key, None, bias)[0]

    arguments = tensors(rows, keys)
    graph = make_fx(function, tracing_mode=mode)(*arguments)
    (site,) = find_sites(graph.graph, {})
    prover = MaskProver()
    match = prover.match(site)
    prover.describe(site, match)
    if isinstance(match, Match):
        prover.rewrite(match)
        graph.graph.lint()
        graph.recompile()
    torch.testing.assert_close(graph(*arguments), function(*arguments), equal_nan=True)
    return mask_text(site)


MODES = table("mode", ["fake", "symbolic"])


@table(("make", "text"), [*MASKS.values(), *FINITE.values()], ids=[*MASKS, *(f"finite {name}" for name in FINITE)])
@MODES
def test_a_float_mask_is_a_mask(make, text, mode):
    assert proved(make, mode) == text


@table("make", BIASES.values(), ids=BIASES.keys())
@MODES
def test_what_is_no_mask_stays_a_bias(make, mode):
    assert proved(make, mode) == "full + bias"


def test_a_finite_window_is_a_mask_only_where_every_row_reaches_a_key():
    def window(m, n):
        return added((j_(n) <= i_(m)) & (i_(m) - j_(n) < 3), LOWEST)

    assert proved(window, "fake", 6, 9) == "band(-2, 0)"
    assert proved(window, "fake", 8, 6) == "band(-2, 0)"
    assert proved(window, "fake", 9, 6) == "full + bias"
    assert proved(window, "symbolic") == "full + bias"


def test_a_finite_mask_stays_a_bias_beside_one_that_may_empty_a_row():
    def both(m, n, p):
        return added(j_(n) <= i_(m), LOWEST) + added(p)[:, None, None]

    assert proved(both, "fake") == "tensor + bias"


@table("dynamic", [False, True])
@table("name", ["triu of -inf", "causal plus padding", "a mask and a bias"])
def test_float_masks_of_scaled_dot_product_attention(name, dynamic):
    make, text = MASKS[name]
    (report,) = compiled(attend(make), *tensors(), platform="npu", dynamic=dynamic)
    assert [site.mask for site in report.sites] == [text]


def test_layers_share_what_is_left_of_a_float_mask():
    def layers(query, key, padding):
        mask = added(j_(key.shape[2]) <= i_(query.shape[2])) + added(padding)[:, None, None]
        for _ in range(3):
            query = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        return query

    (report,) = compiled(layers, *tensors(), platform="cpu")
    assert [site.mask for site in report.sites] == ["causal & tensor"] * 3


def test_a_bool_mask_beside_a_float_mask():
    def function(query, key, padding):
        m, n = query.shape[2], key.shape[2]
        return ATTENTION(query, key, key, ones(m, n).tril() & padding[:, None, None], added(i_(m) - j_(n) < 3))[0]

    (report,) = compiled(function, *tensors(), platform="cpu")
    assert [site.mask for site in report.sites] == ["band(-2, 0) & tensor"]
