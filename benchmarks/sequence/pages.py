"""Whether the allocator of the ranks hands large blocks back to the kernel, or keeps their pages as devices do.

glibc gives a block above 32 MiB back as soon as it is free: the next message of that size pays for pages that the
kernel clears once more. gloo's all-gather has two blocks of the size of its result, one of them its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

FRESH, KEPT = "fresh", "kept"
VARIABLE = "GLIBC_TUNABLES"
# One arena for all threads: another one's heap is 64 MiB at most, and gloo's threads allocate too.
KEEP = {"mmap_threshold": 1 << 32, "trim_threshold": 1 << 34, "arena_max": 1}


@contextlib.contextmanager
def pages(kind: str) -> Iterator[None]:
    """Ranks that start in the body have the allocator of that kind."""
    before = os.environ.pop(VARIABLE, None)
    if kind == KEPT:
        os.environ[VARIABLE] = ":".join(f"glibc.malloc.{name}={value}" for name, value in KEEP.items())
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before
