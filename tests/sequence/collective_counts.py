"""How often a graph communicates, read from its text. Tests of whole models and benchmarks count with this."""

from __future__ import annotations

import re
from collections import Counter

# Torch's collectives and the ring's shift, which is ours. A wait ends a collective and is none itself.
_STARTED = re.compile(r" = (?:_c10d_functional\.(?!wait_tensor\()|sgl_npu\.(?=ring_shift\())(\w+)\(")


def collective_counts(graph: str) -> dict[str, int]:
    """How often each collective is started in the text of a graph."""
    return dict(Counter(_STARTED.findall(graph)))
