"""The pool of ranks: what it returns, and that no failure of a rank hangs it or is kept from the reader."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from sequence.ranks import RankPool, RanksFailed

SLEEP = 600
SECONDS = 12  # on a busy machine a rank is late by some of them


@pytest.fixture(scope="module")
def impatient():
    """A pool that gives up soon."""
    pool = RankPool(2, seconds=SECONDS)
    yield pool
    pool.close()


def summed(x, scale=1):
    total = x * scale * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total


def raises_on(rank, wait):
    if dist.get_rank() in rank:
        raise ValueError(f"rank {dist.get_rank()} has no value")
    if wait:
        dist.barrier()
    return "fine"


def sleeps_on(rank):
    if dist.get_rank() == rank:
        time.sleep(SLEEP)
    return "fine"


def ends_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def setting():
    environment = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return dist.get_rank(), dist.get_world_size(), dist.get_backend(), torch.get_num_threads(), environment


def process():
    return os.getpid()


def summed_in_pairs():
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    totals = []
    for name in mesh.mesh_dim_names:
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total, group=mesh.get_group(name))
        totals.append(total.item())
    return totals


def not_to_be_pickled():
    return lambda: None


def test_results_are_in_the_order_of_ranks(ranks):
    expected = [(rank, 3, "gloo", 1, [str(rank), str(rank), "3"]) for rank in range(3)]
    assert ranks(3).run(setting) == expected


def test_ranks_exchange_tensors_and_return_them(ranks):
    for total in ranks(2).run(summed, torch.ones(3), scale=2):
        assert total.tolist() == [6.0, 6.0, 6.0]


def test_ranks_form_a_mesh(ranks):
    assert ranks(4).run(summed_in_pairs) == [[2, 1], [4, 1], [2, 5], [4, 5]]


def test_processes_are_kept_between_calls(ranks):
    assert ranks(2).run(process) == ranks(2).run(process)


def test_an_exception_on_every_rank_keeps_the_processes(ranks):
    before = ranks(2).run(process)
    first, second = ranks(2).outcomes(raises_on, (0, 1), wait=False)
    assert "ValueError: rank 0 has no value" in first.failure
    assert "ValueError: rank 1 has no value" in second.failure
    assert ranks(2).run(process) == before


def test_an_exception_on_one_rank_is_reported_and_the_one_that_waits_for_it_is_ended(impatient):
    with pytest.raises(
        RanksFailed, match=r"(?s)rank 0: no answer .* after rank 1 failed.*\nrank 1: Traceback"
    ) as error:
        impatient.run(raises_on, (1,), wait=True)
    assert "ValueError: rank 1 has no value" in str(error.value)
    assert [total.item() for total in impatient.run(summed, torch.tensor(1.0))] == [3.0, 3.0]


def test_a_hang_on_one_rank_is_reported(impatient):
    start = time.monotonic()
    first, second = impatient.outcomes(sleeps_on, 1)
    assert (first.value, first.failure) == ("fine", "")
    assert second.failure.startswith(f"no answer for {SECONDS} s, while it was here:")
    assert "in sleeps_on" in second.failure
    assert time.monotonic() - start < SLEEP
    assert impatient.run(sleeps_on, None) == ["fine", "fine"]


def test_a_process_that_dies_is_reported(impatient):
    first, second = impatient.outcomes(ends_on, 1)
    assert first.failure
    assert second.failure == "the process ended with exit code 7"


def test_a_value_that_cannot_be_pickled_is_reported(impatient):
    first, _ = impatient.outcomes(not_to_be_pickled)
    assert "pickle" in first.failure


def test_a_closed_pool_leaves_no_process(impatient):
    pids = impatient.run(process)
    impatient.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
