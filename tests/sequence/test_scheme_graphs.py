"""The graphs of the schemes: the same on every rank, as few collectives as can be, no mask where none is needed."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.testing._internal.distributed.fake_pg import FakeStore

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sequence import SCHEMES, choose_scheme
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh

COLLECTIVES = {
    torch.ops._c10d_functional.all_to_all_single.default: "all_to_all",
    torch.ops._c10d_functional.all_gather_into_tensor.default: "all_gather",
    torch.ops.sgl_npu.ring_shift.default: "shift",
    attention: "attention",
}
ULYSSES = ["all_to_all", "attention", "all_to_all"]


@dataclass(frozen=True)
class Site:
    """One attention of B = 2, Hq = 8, Hkv = 2, D = 16, and the collectives and attentions of its graph, in order."""

    scheme: str
    degrees: tuple[int, int]
    order: list[str]
    bands: list[tuple]
    zigzag: bool = False
    lower: int | None = None
    upper: int | None = None
    length: int = 64


FULL, CAUSAL = (None, None), (None, 0)
RING = ["shift", "attention", "shift", "attention", "shift", "attention", "attention"]
MASK_FREE = {
    "ulysses": Site("ulysses", (1, 4), ULYSSES, [FULL]),
    "ulysses causal": Site("ulysses", (1, 4), ULYSSES, [CAUSAL], upper=0),
    "ulysses causal, zigzag": Site("ulysses", (1, 4), ULYSSES, [CAUSAL], upper=0, zigzag=True),
    "ulysses causal, uneven": Site("ulysses", (1, 4), ULYSSES, [CAUSAL], upper=0, length=61),
    "ulysses window": Site("ulysses", (1, 4), ULYSSES, [(-5, 0)], lower=-5, upper=0),
    "ring": Site("ring", (4, 1), RING, [FULL] * 4),
    "ring causal, zigzag": Site("ring", (4, 1), RING, [CAUSAL] + [FULL] * 3, upper=0, zigzag=True),
    "ring causal, zigzag, uneven": Site("ring", (4, 1), RING, [CAUSAL] + [FULL] * 3, upper=0, zigzag=True, length=61),
    "ring causal, in order": Site("ring", (4, 1), RING, [CAUSAL] + [FULL] * 3, upper=0),
    "ring window of two chunks": Site("ring", (4, 1), RING[-3:], [(-10, 0), (6, None)], lower=-10, upper=0),
    "ring window both ways": Site(
        "ring", (4, 1), ["shift", "shift"] + ["attention"] * 3, [(-4, 5), (12, None), (None, -11)], lower=-4, upper=5
    ),
    "hybrid causal": Site(
        "ring",
        (2, 2),
        ["all_to_all", "shift", "attention", "attention", "all_to_all"],
        [CAUSAL, FULL],
        upper=0,
        zigzag=True,
    ),
    "kv_gather": Site("kv_gather", (4, 1), ["all_gather", "attention"], [FULL]),
    "kv_gather causal, zigzag": Site(
        "kv_gather", (4, 1), ["all_gather"] + ["attention"] * 3, [FULL, CAUSAL, FULL], upper=0, zigzag=True
    ),
    "kv_gather causal, zigzag, uneven": Site(
        "kv_gather", (4, 1), ["all_gather"] + ["attention"] * 3, [FULL, CAUSAL, FULL], upper=0, zigzag=True, length=61
    ),
    "hybrid gather": Site("kv_gather", (2, 2), ["all_to_all", "all_gather", "attention", "all_to_all"], [FULL]),
}
MASKED = {
    "ring, uneven": Site("ring", (4, 1), RING, [FULL] * 4, length=61),
    "ring window, zigzag": Site("ring", (4, 1), RING, [FULL] * 4, lower=-10, upper=0, zigzag=True),
    "kv_gather causal, in order": Site(
        "kv_gather", (4, 1), ["all_gather", "attention", "attention"], [CAUSAL, FULL], upper=0
    ),
}

# Of (B, H, S, D) the length alone is a symbol.
LENGTH = StatelessSymbolicContext(
    dynamic_sizes=[DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC],
    constraint_sizes=[None] * 4,
)


@contextlib.contextmanager
def world(rank: int, size: int = 4):
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


def graph_of(
    site: Site, rank: int, mode: str = "symbolic", platform: str = "cpu", **tensors: torch.Tensor
) -> torch.fx.Graph:
    """The graph of slicing whole tensors and of the scheme on the rank's rows."""
    names = list(tensors)

    def sharded(query, key, value, ranks, *rest):
        with_mesh = SequenceMesh(*(Axis(size, name) for size in (*site.degrees, 4)))
        layout = SequenceLayout((query.size(2),), *site.degrees, site.zigzag)
        rows = layout.positions(ranks)
        local = [x.index_select(2, rows) for x in (query, key, value)]
        given = dict(zip(names, rest, strict=True))
        call = AttentionCall(*local, lower=site.lower, upper=site.upper, platform=platform, **given)
        out, _ = SCHEMES[site.scheme].emit(call, layout, layout, with_mesh, ranks)
        return out

    with world(rank) as name:
        inputs = [torch.zeros(2, heads, site.length, 16) for heads in (8, 2, 2)]
        ranks = torch.tensor(divmod(rank, site.degrees[1]))
        if mode != "given":
            return make_fx(sharded, tracing_mode=mode)(*inputs, ranks, *tensors.values()).graph
        with FakeTensorMode(shape_env=ShapeEnv()) as fake:
            given = [fake.from_tensor(x, symbolic_context=LENGTH) for x in inputs]
            return make_fx(sharded)(*given, fake.from_tensor(ranks)).graph


def order_of(graph: torch.fx.Graph) -> list[str]:
    return [COLLECTIVES[node.target] for node in graph.nodes if node.target in COLLECTIVES]


def targets_of(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


def attentions(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.target is attention]


def masks_of(graph: torch.fx.Graph) -> list:
    return [x for node in attentions(graph) for x in node.args[3:5] if x is not None]


def bands_of(graph: torch.fx.Graph) -> list[tuple]:
    return [(node.kwargs.get("lower"), node.kwargs.get("upper")) for node in attentions(graph)]


SITES = {**MASK_FREE, **MASKED}
SYMBOLIC = ["ulysses causal", "ring causal, zigzag", "ring", "hybrid causal", "kv_gather causal, zigzag"]
traced = functools.cache(lambda name, rank, mode: graph_of(SITES[name], rank, mode))


@pytest.mark.parametrize("name", SITES)
def test_every_rank_has_the_same_graph(name):
    assert str(traced(name, 0, "fake")) == str(traced(name, 1, "fake")) == str(traced(name, 3, "fake"))


@pytest.mark.parametrize("name", SYMBOLIC)
def test_every_rank_has_the_same_graph_of_a_symbolic_length(name):
    assert str(traced(name, 0, "symbolic")) == str(traced(name, 3, "symbolic"))


@pytest.mark.parametrize("name", SITES)
def test_the_collectives_are_as_few_as_can_be_and_start_before_the_attention_they_overlap_with(name):
    assert order_of(traced(name, 0, "fake")) == SITES[name].order


@pytest.mark.parametrize("name", MASK_FREE)
def test_no_mask_is_made_where_none_is_needed(name):
    graph = traced(name, 0, "fake")
    assert masks_of(graph) == []
    assert bands_of(graph) == SITES[name].bands


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_is_made_where_positions_need_one(name):
    assert masks_of(traced(name, 0, "fake"))


@pytest.mark.parametrize("name", [name for name in SYMBOLIC if "causal" in name])
def test_a_symbolic_length_needs_no_mask_under_causal_attention(name):
    graph = traced(name, 0, "symbolic")
    assert masks_of(graph) == [] and order_of(graph) == SITES[name].order


@pytest.mark.parametrize("name", SITES)
def test_a_scheme_traces_on_fake_tensors_whose_length_is_a_symbol(name):
    site = SITES[name]
    assert order_of(graph_of(site, 0, "given")).count("attention") == site.order.count("attention")


@pytest.mark.parametrize("name", ["ring", "kv_gather"])
def test_a_mask_of_keys_alone_keeps_one_row(name):
    mask = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    graph = graph_of(MASK_FREE[name], 0, "fake", mask=mask)
    assert {tuple(x.meta["val"].shape[1:3]) for x in masks_of(graph)} == {(1, 1)}


MERGES = {"ulysses causal": 0, "ring": 3, "ring causal, zigzag": 6, "kv_gather causal, zigzag": 2, "hybrid causal": 2}


@pytest.mark.parametrize("name", MERGES)
def test_parts_are_merged_by_one_op_on_an_npu_and_by_a_formula_elsewhere(name):
    targets = {platform: targets_of(graph_of(SITES[name], 0, "fake", platform)) for platform in ("npu", "cuda", "cpu")}
    assert targets["npu"].count("npu.npu_attention_update.default") == MERGES[name]
    assert "aten.exp.default" not in targets["npu"]
    assert targets["cpu"] == targets_of(traced(name, 0, "fake"))
    for platform in ("cuda", "cpu"):
        assert "npu.npu_attention_update.default" not in targets[platform]
        assert targets[platform].count("aten.exp.default") >= 2 * MERGES[name]


@pytest.mark.parametrize("platform, together", [("npu", False), ("cuda", False), ("cpu", True)])
def test_keys_arrive_in_the_order_that_the_kernels_of_the_platform_want(platform, together):
    """On a CPU the rows of a head lie together."""
    graph = graph_of(SITES["ring"], 0, "fake", platform)
    _, *arrived = graph.find_nodes(op="call_function", target=attention)
    assert arrived
    for key in (node.args[1].meta["val"] for node in arrived):
        assert (key.stride(2) == key.size(3)) == together


def test_ranks_beyond_the_heads_are_refused():
    call = AttentionCall(*(torch.zeros(1, heads, 8, 16) for heads in (2, 2, 2)))
    mesh = SequenceMesh(Axis(1, ""), Axis(4, ""), Axis(4, ""))
    layout = SequenceLayout((32,), 1, 4)
    assert (
        SCHEMES["ulysses"].refuse(call, layout, layout, mesh).startswith("ulysses = 4 is more than the 2 query heads")
    )
    assert SCHEMES["ring"].refuse(call, layout, layout, mesh).startswith("the mesh has one block")
    blocks = replace(mesh, blocks=Axis(4, ""), ulysses=Axis(1, ""))
    assert SCHEMES["ulysses"].refuse(call, layout, layout, blocks).startswith("the mesh has 4 blocks")


# B = 2, Hq = 8, Hkv = 2, D = Dv = 16, float32, 16 rows per rank; bytes of one rank's query, and of its key and value.
QUERY, KEY_VALUE = 2 * 8 * 16 * 16 * 4, 2 * 2 * 16 * 32 * 4
BYTES = {
    "ulysses": (2 * QUERY + 2 * KEY_VALUE) * 3 // 4,  # each key head goes to two ranks
    "ring": 3 * KEY_VALUE,
    "ring window of two chunks": KEY_VALUE,
    "kv_gather": 3 * KEY_VALUE,
    "hybrid causal": (2 * QUERY + KEY_VALUE) // 2 + KEY_VALUE,
}


@pytest.mark.parametrize("name", BYTES)
def test_the_predicted_bytes_are_those_that_one_rank_sends(name):
    site = MASK_FREE[name]
    layout = SequenceLayout((site.length,), *site.degrees, site.zigzag)
    mesh = SequenceMesh(*(Axis(size, "") for size in (*site.degrees, 4)))
    call = AttentionCall(*(torch.zeros(2, heads, 16, 16) for heads in (8, 2, 2)), lower=site.lower, upper=site.upper)
    assert SCHEMES[site.scheme].bytes(call, layout, layout, mesh) == BYTES[name]


@pytest.mark.parametrize(
    "degrees, upper, sent, takes_whole_keys",
    [
        ((4, 1), None, 3 * KEY_VALUE, True),
        ((4, 1), 0, 3 * KEY_VALUE, True),
        ((2, 2), None, 3 * KEY_VALUE, True),
        ((2, 2), 0, (2 * QUERY + KEY_VALUE) // 2 + KEY_VALUE, False),  # pieces of causal blocks would be twice the work
    ],
    ids=str,
)
def test_keys_that_are_gathered_anyway_cost_that_one_gather(degrees, upper, sent, takes_whole_keys):
    layout = SequenceLayout((64,), *degrees, upper == 0)
    mesh = SequenceMesh(*(Axis(size, "") for size in (*degrees, 4)))
    call = AttentionCall(*(torch.zeros(2, heads, 16, 16) for heads in (8, 2, 2)), upper=upper)
    chosen = choose_scheme(call, layout, layout, mesh, ["ring", "kv_gather"], keys_are_gathered=True)
    assert (chosen.name, chosen.sent, chosen.takes_whole_keys) == ("kv_gather", sent, takes_whole_keys)
    assert not choose_scheme(call, layout, layout, mesh, ["kv_gather"]).takes_whole_keys
