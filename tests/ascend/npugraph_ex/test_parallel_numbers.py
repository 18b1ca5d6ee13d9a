"""Two ranks on the stand-in exchange what they compute over gloo: the numbers of models whose sequence is shared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from parallel_cases import COUNTS, on_ranks

SCRIPT = Path(__file__).parents[1] / "parallel_rank.py"
WORLD, LENGTHS, TOLERANCE = 2, 1, 5e-3
CASES = on_ranks(WORLD)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank says of each case."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    commands = [[sys.executable, str(SCRIPT), str(rank), str(WORLD), str(store)] for rank in range(WORLD)]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    outputs = [rank.communicate() for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(error[-3000:] for _, error in outputs)
    rows = [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text, _ in outputs]
    return [{(row["model"], row["degrees"]): row for row in of_rank} for of_rank in rows]


@pytest.mark.parametrize(("model", "degrees"), CASES)
def test_every_rank_computes_what_one_device_would(found, model, degrees):
    for rank in found:
        assert len(rank[model, degrees]["errors"]) == LENGTHS
        assert max(rank[model, degrees]["errors"]) <= TOLERANCE


@pytest.mark.parametrize(("model", "degrees"), CASES)
def test_exactly_the_exchanges_of_the_scheme_are_run(found, model, degrees):
    for rank in found:
        exchanges = rank[model, degrees]["ran"].get("c10d::alltoall_base_", 0)
        assert exchanges == 2 * LENGTHS * COUNTS[model][degrees].exchanges
