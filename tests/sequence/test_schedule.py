"""The steps that a report draws are those of the schemes' graphs: as many, in that order, of that size."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from sequence.scheme_cases import DEGREES
from test_scheme_graphs import SITES, Site, attentions, graph_of, order_of

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sequence import SCHEMES, choose_scheme
from sgl_npu.lowering.sequence.schedule import Schedule, area, schedule
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh


def mesh_of(blocks: int, ulysses: int) -> SequenceMesh:
    return SequenceMesh(Axis(blocks, ""), Axis(ulysses, ""), Axis(blocks * ulysses, ""))


def steps_of(site: Site) -> Schedule:
    layout = SequenceLayout((site.length,), *site.degrees, site.zigzag)
    local = [torch.empty(2, heads, layout.local_length, 16) for heads in (8, 2, 2)]
    call = AttentionCall(*local, lower=site.lower, upper=site.upper)
    return schedule(site.scheme, call, layout, layout, mesh_of(*site.degrees))


def kinds(found: Schedule) -> list[str]:
    words = {"q, k, v": "all_to_all", "result": "all_to_all", "gather": "all_gather"}
    return [
        "attention" if step.lane == "compute" else words.get(step.labels[0], step.labels[0].split()[0])
        for step in found.steps
    ]


@pytest.mark.parametrize("name", SITES)
def test_steps_are_in_the_order_of_the_graph(name):
    assert kinds(steps_of(SITES[name])) == order_of(graph_of(SITES[name], 0, "fake"))


def operations(node: torch.fx.Node) -> int:
    query, key, value = (x.meta["val"].shape for x in node.args[:3])
    pairs = area(query[2], key[2], node.kwargs.get("lower"), node.kwargs.get("upper"))
    return 2 * query[0] * query[1] * (query[3] + value[3]) * pairs


# Keys and queries that are padding are computed with the others where lengths do not divide.
@pytest.mark.parametrize("name", [name for name in SITES if "uneven" not in name])
def test_each_step_computes_what_its_attention_in_the_graph_computes(name):
    found = [step.amount for step in steps_of(SITES[name]).steps if step.lane == "compute"]
    assert found == [operations(node) for node in attentions(graph_of(SITES[name], 0, "fake"))]


@pytest.mark.parametrize("name", SITES)
def test_a_step_waits_for_earlier_ones_alone(name):
    for number, step in enumerate(steps_of(SITES[name]).steps):
        assert all(0 <= before < number for before in step.after)


GRIDS = [(blocks, ulysses) for rows in DEGREES.values() for blocks, ulysses in rows]
CALLS = {
    "no mask": {},
    "causal": {"upper": 0},
    "window": {"lower": -9, "upper": 0},
    "both ways": {"lower": -9, "upper": 9},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("grid", "zigzag"), list(product(GRIDS, (False, True))))
def test_what_the_steps_send_is_what_the_table_says(call, grid, zigzag):
    mesh = mesh_of(*grid)
    layout = SequenceLayout((64,), *grid, zigzag)
    tensors = [torch.empty(2, heads, layout.local_length, 8, dtype=torch.bfloat16) for heads in (6, 2, 2)]
    found = AttentionCall(*tensors, **CALLS[call])
    for scheme in SCHEMES.values():
        for given in (found, replace(found, needs_lse=True)):
            if scheme.refuse(given, layout, layout, mesh) is None:
                steps = schedule(scheme.name, given, layout, layout, mesh)
                assert steps.total("send") == scheme.bytes(given, layout, layout, mesh), scheme.name


@pytest.mark.parametrize("name", ["ulysses", "ring", "kv_gather"])
def test_what_is_chosen_has_the_schedule_of_its_bytes(name):
    layout = SequenceLayout((64,), 4, 1, False)
    call = AttentionCall(*(torch.empty(1, 4, 16, 8) for _ in range(3)))
    chosen = choose_scheme(call, layout, layout, mesh_of(4, 1), (name,))
    found = chosen.schedule(call)
    assert found.scheme == name and found.total("send") == chosen.sent
    assert (found.blocks, found.ulysses) == ((1, 4) if name == "ulysses" else (4, 1))


@pytest.mark.parametrize(
    ("name", "grid", "call", "messages"),
    [
        ("ulysses", (1, 4), "no mask", "2 all-to-all"),
        ("ring", (4, 1), "no mask", "3 shifts"),
        ("ring", (2, 1), "no mask", "1 shift"),
        ("ring", (4, 1), "window", "1 shift"),
        ("ring", (2, 2), "no mask", "1 shift, 2 all-to-all"),
        ("kv_gather", (4, 1), "causal", "1 all-gather"),
        ("kv_gather", (2, 2), "no mask", "1 all-gather, 2 all-to-all"),
    ],
)
def test_messages_are_numbers_for_the_degrees_at_hand(name, grid, call, messages):
    layout = SequenceLayout((64,), *grid, False)
    found = AttentionCall(*(torch.empty(1, 4, 16, 8) for _ in range(3)), **CALLS[call])
    chosen = choose_scheme(found, layout, layout, mesh_of(*grid), (name,))
    assert chosen.collectives == messages
    steps = Counter(step.lane for step in chosen.schedule(found).steps)
    assert steps["send"] == sum(int(part.split()[0]) for part in messages.split(", "))


def test_keys_that_are_gathered_anyway_are_gathered_once():
    layout = SequenceLayout((64,), 4, 1, False)
    call = AttentionCall(*(torch.empty(1, 4, 16, 8) for _ in range(3)))
    chosen = choose_scheme(call, layout, layout, mesh_of(4, 1), ("ring", "kv_gather"), keys_are_gathered=True)
    assert Counter(step.lane for step in chosen.schedule(call).steps) == {"send": 1, "compute": 1}
    assert chosen.schedule(call).total("send") == chosen.sent


def test_keys_that_every_rank_has_are_not_sent():
    layout = SequenceLayout((64,), 4, 1, False)
    call = AttentionCall(torch.empty(1, 4, 16, 8), *(torch.empty(1, 4, 9, 8) for _ in range(2)))
    chosen = choose_scheme(call, layout, None, mesh_of(4, 1), ("ring",))
    assert chosen.collectives.startswith("none: every rank has all these keys and values anyway")
    (step,) = chosen.schedule(call).steps
    assert step.lane == "compute" and step.amount == 2 * 4 * 16 * 16 * 9


def test_ranks_name_the_keys_they_have_and_leave_out_what_is_past_an_end():
    ring = steps_of(SITES["ring"])
    assert [step.labels for step in ring.steps if step.lane == "compute"][1] == ("k3", "k0", "k1", "k2")
    window = steps_of(SITES["ring window both ways"])
    before, after = [step.labels for step in window.steps if step.lane == "compute"][1:]
    assert before == ("", "k0", "k1", "k2") and after == ("k1", "k2", "k3", "")


@pytest.mark.parametrize(("rows", "keys"), [(5, 9), (9, 5), (1, 4), (6, 6), (0, 3)])
@pytest.mark.parametrize(("lower", "upper"), [(None, None), (None, 0), (-2, 1), (3, None), (None, -4), (2, 1)])
def test_pairs_of_a_band_are_counted(rows, keys, lower, upper):
    sides = (float("-inf") if lower is None else lower, float("inf") if upper is None else upper)
    expected = sum(sides[0] <= j - i <= sides[1] for i in range(rows) for j in range(keys))
    assert area(rows, keys, lower, upper) == expected
