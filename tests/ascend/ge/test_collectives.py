"""Which functional collectives convert to GE: the forms that sequence parallelism may use."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from stand_in import ge
from torch.distributed import _functional_collectives as collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

import sgl_npu  # noqa: F401

WORLD = 4


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("fake", rank=1, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


def exchange(x):
    return collectives.all_to_all_single(x, None, None, dist.group.WORLD)


def shift(x):
    """One step around a ring. Flat, as permute_tensor counts in elements where all_to_all_single counts in rows."""
    return collectives.permute_tensor(x.flatten(), [(rank + 1) % WORLD for rank in range(WORLD)], dist.group.WORLD)


CONVERT = {
    "all_reduce": (lambda x: collectives.all_reduce(x, "sum", dist.group.WORLD), "HcomAllReduce"),
    "all_gather": (lambda x: collectives.all_gather_tensor(x, 0, dist.group.WORLD), "HcomAllGather"),
    "reduce_scatter": (lambda x: collectives.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD), "HcomReduceScatter"),
    "all_to_all_single": (exchange, "HcomAllToAllV"),
    "permute_tensor": (shift, "HcomAllToAllV"),
}


@pytest.mark.parametrize("name", CONVERT)
def test_a_functional_collective_converts(name):
    function, operator = CONVERT[name]
    options = {"platform": "npu", "inner": "torchair", "inner_options": {"debug.run_eagerly": True}}
    with ge.converted() as graphs, torch.no_grad():
        compiled = torch.compile(lambda x: collectives.wait_tensor(function(x)) * 2, backend="sgl_npu", options=options)
        # Converted; the dry run that follows has no kernels for npu_define's collectives.
        with contextlib.suppress(NotImplementedError):
            compiled(torch.ones(8, 6))
    assert ge.ops(graphs[0])[operator] == 1
