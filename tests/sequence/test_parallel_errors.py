"""Every mistake with ranks is one clear message on every rank, and none of them is a hang."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sequence.ranks import RankPool
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import sgl_npu

HEADS, SIZE, LENGTH = 4, 8, 16


class Attention(nn.Module):
    """Causal attention of a sequence to itself."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.project = nn.Linear(SIZE, 3 * heads * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, SIZE)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def error_of(parallel, heads=HEADS, length=LENGTH, gradients=False, dynamic=None):
    """The type and message of what a call raises, on one rank."""
    options = {"inner": "eager", "parallel": parallel}
    compiled = torch.compile(Attention(heads), backend="sgl_npu", dynamic=dynamic, options=options)
    try:
        with torch.set_grad_enabled(gradients):
            compiled(torch.ones(1, length, SIZE))
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def error_with_mesh(shape, names, parallel):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return error_of({**parallel, "mesh": mesh})


def on_all_ranks(found, expected):
    """Every rank raised an error of that type, and its message has the text."""
    for name, message in found:
        assert name == expected[0], message
        assert expected[1] in message


OPTIONS = [
    ({"ring": 4}, "parallel: ring = 4 is 4 ranks, but the world has 2; make the product 2, or pass mesh, a DeviceMesh"),
    ({"ulysses": 2, "kv_gather": 2}, "kv_gather = 2, ulysses = 2 is 4 ranks, but the world has 2; make the product 2"),
    ({"degree": 3}, "degree = 3 is 3 ranks, but the world has 2"),
    ({"degree": 2, "ring": 2}, "ring = 2, degree = 2: degree leaves the schemes to us; give it alone, or leave it out"),
    ({"ring": 2, "kv_gather": 2}, "a sequence is shared by a ring or by a gather; leave one of them at 1"),
    ({"ulysses": 2, "placement": "zigzag"}, "ulysses computes whole sequences and needs no zigzag; leave placement"),
    ({"rings": 2}, "unknown option 'parallel.rings': did you mean 'parallel.ring'?"),
]


@pytest.mark.parametrize(("parallel", "message"), OPTIONS, ids=[str(parallel) for parallel, _ in OPTIONS])
def test_an_option_that_cannot_be_is_named_on_every_rank(ranks, parallel, message):
    on_all_ranks(ranks(2).run(error_of, parallel), ("OptionsError", message))


@pytest.mark.parametrize("parallel", [{"ring": 2}, {"ulysses": 2, "ring": 2}, {"degree": 2}], ids=str)
def test_without_a_process_group_the_error_says_how_to_get_one(parallel):
    name, message = error_of(parallel)
    assert name == "OptionsError"
    assert (
        "needs a process group, and there is none; start the program with torchrun and call torch.distributed"
        in message
    )
    assert all(f"{key} = {degree}" in message for key, degree in parallel.items())


MESHES = [
    ((4,), ("cp",), {"ring": 4}, "ring = 4, but the mesh has no dimension 'ring' (it has cp by name); name one so in"),
    ((2, 2), ("dp", "ring"), {"ring": 2, "ulysses": 2}, "ulysses = 2, but the mesh has no dimension 'ulysses' (it has"),
    ((2, 2), ("dp", "ring"), {"ring": 4}, "ring = 4, but dimension 'ring' of the mesh has 2 ranks; make them equal"),
    ((2, 2), ("ulysses", "ring"), {"ring": 2, "ulysses": 2}, "order ulysses, ring; ring must come before ulysses"),
    ((4,), None, {"ring": 4}, "the mesh has no dimension 'ring' (it has none by name)"),
]


@pytest.mark.parametrize(("shape", "names", "parallel", "message"), MESHES, ids=[x[3][:40] for x in MESHES])
def test_a_mesh_that_does_not_fit_is_named_on_every_rank(ranks, shape, names, parallel, message):
    on_all_ranks(ranks(4).run(error_with_mesh, shape, names, parallel), ("OptionsError", message))


def outside_a_mesh():
    """Ranks 0 and 1 make a mesh; the others hold it too and are not in it."""
    mesh = DeviceMesh("cpu", [0, 1], mesh_dim_names=("ring",))
    return ("", "") if dist.get_rank() < 2 else error_of({"ring": 2, "mesh": mesh})


def test_a_rank_that_is_not_in_the_mesh_is_told_so(ranks):
    found = ranks(4).run(outside_a_mesh)
    on_all_ranks(found[2:], ("OptionsError", "is not in the mesh"))


HEADLESS = [({"ulysses": 2}, 1), ({"ulysses": 2, "ring": 2}, 1), ({"ulysses": 4}, 3)]


@pytest.mark.parametrize(("parallel", "heads"), HEADLESS, ids=str)
def test_ulysses_over_more_ranks_than_heads_is_refused_by_name(ranks, parallel, heads):
    size = parallel["ulysses"] * parallel.get("ring", 1)
    message = f"ulysses = {parallel['ulysses']} is more than the {heads} query heads"
    found = ranks(size).run(error_of, parallel, heads=heads)
    on_all_ranks(found, ("OptionsError", message))
    on_all_ranks(found, ("OptionsError", "no scheme can serve the attention at"))
    on_all_ranks(found, ("OptionsError", "use a ring for the rest"))


def test_degree_uses_another_scheme_where_there_are_too_few_heads(ranks):
    on_all_ranks(ranks(2).run(error_of, {"degree": 2}, heads=1), ("nothing", ""))


def test_a_call_that_records_gradients_is_refused(ranks):
    message = "is for inference; call the model under torch.no_grad() or torch.inference_mode()"
    on_all_ranks(ranks(2).run(error_of, {"ring": 2}, gradients=True), ("OptionsError", message))


def different(change, **settings):
    """Rank 1 makes another call than rank 0."""
    return error_of({"ring": 2}, **settings, **(change if dist.get_rank() == 1 else {}))


DIFFERENT = [{"length": 24}, {"heads": 2}]


@pytest.mark.parametrize("change", DIFFERENT, ids=str)
def test_ranks_with_different_graphs_raise_instead_of_waiting_for_each_other(ranks, change):
    found = ranks(2).run(different, change)
    on_all_ranks(found, ("DifferentGraphsError", "parallel: the ranks have compiled different graphs"))
    on_all_ranks(found, ("DifferentGraphsError", "every rank must call the same model with inputs of the same shapes"))
    assert found[0] == found[1]


def test_ranks_that_compile_one_graph_for_different_lengths_raise(ranks):
    found = ranks(2).run(different, {"length": 24}, dynamic=True)
    on_all_ranks(found, ("DifferentGraphsError", "every rank must call the same model with inputs of the same shapes"))
    on_all_ranks(ranks(2).run(error_of, {"ring": 2}, dynamic=True), ("nothing", ""))


class Summed(Attention):
    """Attention whose result is summed over a group that has nothing to do with the sequence."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(super().forward(x), "sum", self.group)


def summed_beside_a_ring():
    """The error of a model whose ranks of one sequence sum over groups of different names."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "tp"))
    model, x = Summed(mesh.get_group("tp")), torch.ones(1, LENGTH, SIZE)
    parallel = {"ring": 2, "mesh": mesh}
    compiled = torch.compile(model, backend="sgl_npu", options={"inner": "eager", "parallel": parallel})
    with torch.no_grad():
        return (compiled(x) - 2 * Attention()(x)).abs().max().item()


def test_groups_of_another_parallelism_do_not_make_graphs_different(ranks):
    assert max(ranks(4).run(summed_beside_a_ring)) < 1e-5


def test_rows_and_columns_of_a_grid_do_not_make_graphs_different(ranks):
    on_all_ranks(ranks(4).run(error_of, {"ring": 2, "ulysses": 2}), ("nothing", ""))


def python_dispatchers():
    """Whether the Python dispatcher was on when graphs were compared."""
    seen, compare = [], dist.all_gather_object

    def watched(*args, **kwargs):
        seen.append(torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher))
        compare(*args, **kwargs)

    with mock.patch.object(dist, "all_gather_object", watched):
        error_of({"ring": 2})
    return seen


def test_graphs_are_compared_without_the_gil(ranks):
    assert ranks(2).run(python_dispatchers) == [[False], [False]]


def test_the_ranks_go_on_after_a_mistake(ranks):
    ranks(2).run(different, DIFFERENT[0])
    on_all_ranks(ranks(2).run(error_of, {"ring": 2}), ("nothing", ""))


# ---------------------------------------------------------------- a rank that dies, or does not answer


@pytest.fixture
def mortal():
    pool = RankPool(2)
    yield pool
    pool.close()


def dies(parallel):
    """Rank 1 ends after a first call; what the other one gets from its second."""
    compiled = torch.compile(Attention(), backend="sgl_npu", options={"inner": "eager", "parallel": parallel})
    with torch.no_grad():
        compiled(torch.ones(1, LENGTH, SIZE))
        if dist.get_rank() == 1:
            os._exit(7)
        try:
            compiled(torch.ones(1, LENGTH, SIZE))
        except RuntimeError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize("parallel", [{"ring": 2}, {"kv_gather": 2}], ids=str)
def test_a_rank_that_dies_is_an_error_of_the_process_group(mortal, parallel):
    survivor, dead = mortal.outcomes(dies, parallel)
    assert dead.failure == "the process ended with exit code 7"
    assert "onnection" in survivor.value, survivor


def sleeps(seconds):
    """Rank 1 comes late to the second call; what the other one gets from a group that waits for less than that."""
    group = dist.new_group(timeout=timedelta(seconds=seconds - 5))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ring",))
    options = {"inner": "eager", "parallel": sgl_npu.Parallel(ring=2, mesh=mesh)}
    compiled = torch.compile(Attention(), backend="sgl_npu", options=options)
    with torch.no_grad():
        compiled(torch.ones(1, LENGTH, SIZE))
        if dist.get_rank() == 1:
            time.sleep(seconds)
            return ""
        try:
            compiled(torch.ones(1, LENGTH, SIZE))
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_a_rank_that_does_not_answer_is_the_timeout_of_the_users_group(mortal):
    waiting, _ = mortal.run(sleeps, 20)
    assert "Timed out" in waiting
