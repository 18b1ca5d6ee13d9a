"""Sequence parallelism, measured on gloo ranks. The models and the pool of ranks are those of tests/sequence."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
