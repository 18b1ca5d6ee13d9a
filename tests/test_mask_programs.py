"""Random mask programs: what the prover says about a mask is the mask, entry by entry."""

from __future__ import annotations

import pytest
import torch
from compiled_report import ATTENTION
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_band import Disguise
from random_mask import Program
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.passes.mask import MaskProver, Match
from sgl_npu.passes.site import find_sites
from sgl_npu.runtime.attention import band_mask


def check(kind, seed, rows, keys, symbolic=False):
    """How much was proved: "all", "some" or "nothing"; None for a program that torch refuses for these sizes.

    The band and the tensor that the prover leaves are the mask that the program is, entry by entry.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(rows, keys) + 4
    query, key = torch.randn((2, 2, rows, 4), generator=generator), torch.randn((2, 2, keys, 4), generator=generator)
    padding = torch.rand((2, width), generator=generator) > 0.3
    ids = torch.randint(0, 3, (2, width), generator=generator)

    def program(query, key, padding, ids):
        mask = kind(seed, padding, ids).mask(query.size(2), key.size(2))
        return mask, ATTENTION(query, key, key, mask)[0]

    arguments = query, key, padding, ids
    try:
        mask, out = program(*arguments)
    except (RuntimeError, IndexError):  # a program that torch refuses for these sizes says nothing
        return None
    graph = make_fx(program, tracing_mode="symbolic" if symbolic else "fake")(*arguments)
    (site,) = find_sites(graph.graph, {})
    prover = MaskProver()
    match = prover.match(site)
    prover.describe(site, match)
    empty = bool((~mask.expand(2, 2, rows, keys).any(-1)).any())
    assert {"never": not empty, "some": empty, "possible": True}[site.record.empty_rows]
    if not isinstance(match, Match):
        return "nothing"
    prover.rewrite(match)
    expose(graph, site)
    rest, lower, upper, rewritten = graph(*arguments)
    full = torch.ones((2, 2, rows, keys), dtype=torch.bool) if rest is None else rest.expand(2, 2, rows, keys)
    band = band_mask(rows, keys, lower, upper, torch.device("cpu"))
    torch.testing.assert_close(full if band is None else full & band, mask.expand(2, 2, rows, keys))
    torch.testing.assert_close(rewritten, out)
    return "all" if rest is None or rest.dim() < 2 or rest.size(-2) == 1 else "some"


def expose(graph, site):
    """The graph returns what the site's mask and band are, beside its result."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    sides = (site.node.kwargs.get(name) for name in ("lower", "upper"))
    output.args = ((site.argument("mask"), *sides, output.args[0][1]),)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


SIZES = st.integers(1, 7)
FEW = settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**32)
MODES = st.sampled_from([False, False, False, True])


@FEW
@given(SEEDS, SIZES, SIZES, MODES)
def test_what_is_proved_of_a_random_mask_is_the_mask(seed, rows, keys, symbolic):
    check(Program, seed, rows, keys, symbolic)


@FEW
@given(SEEDS, SIZES, SIZES, MODES)
def test_what_is_proved_of_a_band_in_disguise_is_the_band(seed, rows, keys, symbolic):
    check(Disguise, seed, rows, keys, symbolic)


@pytest.mark.parametrize(("kind", "some", "all_"), [(Program, 0.25, 0), (Disguise, 0.85, 0.6)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_random_masks_are_often_proved(kind, some, all_, symbolic):
    found = [x for seed in range(20) if (x := check(kind, seed, 4, 6, symbolic)) is not None]
    assert 1 - found.count("nothing") / len(found) >= some
    assert found.count("all") / len(found) >= all_
