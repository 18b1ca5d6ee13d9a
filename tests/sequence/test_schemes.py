"""Every scheme gives the rows of unsharded attention, in real processes."""

from functools import cache

import pytest
from scheme_cases import BUGS, CASES
from scheme_workers import run_world

results = cache(run_world)


def assert_right(name: str, world: int) -> None:
    errors = results(world)
    assert name in errors, "not run: an earlier case ended the processes"
    assert errors[name] is None, errors[name]


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_that_others_have_had_is_not_here(name):
    assert_right(name, BUGS[name].world)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_gets_its_rows_of_unsharded_attention(name):
    assert_right(name, CASES[name].world)
