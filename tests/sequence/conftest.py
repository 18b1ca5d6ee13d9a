"""`ranks(2)` is a pool of two gloo ranks, kept for the whole run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sequence.ranks import RankPools, rank_pools


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    with rank_pools() as pools:
        yield pools
