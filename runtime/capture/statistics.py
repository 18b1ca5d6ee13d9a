"""What a runner has done so far, and the memory that its graphs hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sgl_npu.runtime.capture.buckets import Bucket


@dataclass
class Statistics:
    """Counts since the runner was made. eager: calls without a graph, by the rule that kept them from one."""

    replays: int = 0
    captures: int = 0
    evictions: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    last_eager_reason: str = ""


@dataclass(frozen=True)
class GraphMemory:
    """Bytes. pool: reserved for all graphs together, None where the device does not tell.

    buckets: what the pool grew by when the bucket was captured (less for a later one, which uses memory of the
    earlier), and the static inputs.
    """

    pool: int | None
    buckets: dict[Bucket, int]
