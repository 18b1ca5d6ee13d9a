"""One sharded attention each: sizes, mask and layout, for the tests of the schemes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch

DEGREES = {2: ((2, 1), (1, 2)), 4: ((4, 1), (1, 4), (2, 2))}


@dataclass(frozen=True)
class Case:
    """`segments` and `kv_segments` are lengths; `degrees` are blocks x ulysses, of the ranks of a subgroup if one."""

    name: str
    scheme: str = ""
    degrees: tuple[int, int] = (1, 1)
    segments: tuple[int, ...] = (32,)
    kv_segments: tuple[int, ...] | None = None
    zigzag: bool = False
    kv_zigzag: bool | None = None
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    size: int = 8
    value_size: int = 8
    mask: str | None = None
    bias: str | None = None
    sinks: bool = False
    softcap: float = 0.0
    lower: int | None = None
    upper: int | None = None
    dtype: torch.dtype = torch.float32
    dense: bool = True
    replicated_keys: bool = False
    knows_rank: bool = False
    world: int = 0

    @property
    def id(self) -> str:
        blocks, ulysses = self.degrees
        return f"{self.name}-{self.scheme}-{blocks}x{ulysses}".replace(" ", "_")


BLOCKS = ("ring", "kv_gather")

# What each scheme must get right on every mesh.
EVERYWHERE = (
    Case("no mask"),
    Case("uneven length", segments=(37,)),
    Case("fewer rows than ranks", segments=(3,)),
    Case("one row", segments=(1,)),
    Case("batch 0", batch=0),
    Case("batch 1, D and Dv differ", batch=1, value_size=12),
    Case("batch 3, keys shared by heads", batch=3, heads=8, kv_heads=2),
    Case("more ranks than key heads, uneven", heads=8, kv_heads=1, segments=(29,)),
    Case("heads that the ranks do not divide", heads=5, kv_heads=5, segments=(21,)),
    Case("shared keys, heads not divided", heads=6, kv_heads=2, segments=(21,)),
    Case("causal, rows in order", upper=0),
    Case("zigzag causal", zigzag=True, upper=0),
    Case("zigzag causal, uneven", zigzag=True, upper=0, segments=(41,), heads=8, kv_heads=2),
    Case("zigzag causal, fewer rows than ranks", zigzag=True, upper=0, segments=(3,)),
    Case("zigzag causal, sinks and softcap", zigzag=True, upper=0, sinks=True, softcap=5.0),
    Case("zigzag causal, key padding", zigzag=True, upper=0, mask="key padding", segments=(37,)),
    Case("zigzag, no mask", zigzag=True, segments=(35,)),
    Case("zigzag, window", zigzag=True, lower=-5, upper=0),
    Case("packed documents", mask="documents", zigzag=True, upper=0),
    Case("packed documents in order, uneven", mask="documents", segments=(39,), upper=0),
    Case("rows that see nothing", mask="blind rows"),
    Case("rows that see nothing, sinks", mask="blind rows", sinks=True),
    Case("mask per head, uneven heads", mask="per head", heads=5, kv_heads=5),
    Case("mask of two dimensions", mask="square", segments=(27,)),
    Case("bias per head", bias="per head", heads=8, kv_heads=4, segments=(30,)),
    Case("bias per head and key", bias="per key", zigzag=True, upper=0),
    Case("sinks", sinks=True, segments=(30,)),
    Case("sinks, uneven heads", sinks=True, heads=5, kv_heads=1),
    Case("softcap", softcap=3.0),
    Case("text and image", segments=(7, 24)),
    Case("text and image, key padding", segments=(8, 24), mask="key padding"),
    Case("text shorter than the ranks", segments=(1, 24), sinks=True),
    Case("cross attention", segments=(32,), kv_segments=(19,)),
    Case("cross attention, key padding", segments=(33,), kv_segments=(20,), mask="key padding"),
    Case("bottom-right", segments=(16,), kv_segments=(40,), upper=24),
    Case("top-left with more keys", segments=(16,), kv_segments=(40,), upper=0),
    Case("zigzag, bottom-right", segments=(16,), kv_segments=(40,), upper=24, zigzag=True),
    Case("window", lower=-5, upper=0, segments=(64,)),
    Case("window, uneven", lower=-11, upper=0, segments=(61,)),
    Case("window both ways", lower=-3, upper=4, segments=(61,)),
    Case("window wider than a chunk both ways", lower=-20, upper=18, segments=(61,)),
    Case("window open to the right", lower=-3, segments=(64,)),
    Case("window that leaves out the diagonal", lower=-40, upper=-20, segments=(61,)),
    Case("window with sinks", lower=-5, upper=0, sinks=True),
    Case("not contiguous", dense=False, zigzag=True, upper=0),
    Case("not contiguous, uneven", dense=False, segments=(37,), heads=8, kv_heads=2),
    Case("bfloat16", dtype=torch.bfloat16, segments=(37,)),
    Case("bfloat16 zigzag causal", dtype=torch.bfloat16, zigzag=True, upper=0, sinks=True),
)

# The calls that have a form for when the rank is a number as the graph runs.
WITH_RANK = tuple(
    replace(case, name=f"{case.name}, rank known", knows_rank=True)
    for case in (
        Case("zigzag causal", zigzag=True, upper=0),
        Case("zigzag causal, uneven", zigzag=True, upper=0, segments=(41,), sinks=True),
        Case("zigzag causal, fewer rows than ranks", zigzag=True, upper=0, segments=(3,)),
        Case("zigzag, bottom-right", segments=(16,), kv_segments=(40,), upper=24, zigzag=True, kv_zigzag=False),
        Case("window", lower=-5, upper=2, segments=(61,)),
        Case("causal with a mask of rows", upper=0, segments=(30,), mask="documents"),
    )
)

REPLICATED = (
    Case("cross attention to keys that all have", kv_segments=(19,), replicated_keys=True),
    Case("the same with key padding", kv_segments=(19,), replicated_keys=True, mask="key padding"),
    Case("the same with a row mask", segments=(30,), kv_segments=(19,), replicated_keys=True, mask="blind rows"),
    Case("a cache with room", segments=(16,), kv_segments=(40,), upper=10, replicated_keys=True, zigzag=True),
)

# Bugs that other implementations have had, each with the call that shows it.
KNOWN_BUGS = (
    Case("diagonal hop without a mask", "ring", (4, 1), zigzag=True, upper=0),
    Case("diagonal hop without a mask, in order", "ring", (4, 1), upper=0),
    Case("replicated text prefix under ring", "ring", (4, 1), segments=(8, 24)),
    Case("local mask passed unsliced", "ring", (4, 1), mask="key padding"),
    Case("local row mask passed unsliced", "kv_gather", (4, 1), mask="documents", upper=0),
    Case("head count from the constructor", "ulysses", (1, 4), heads=5, kv_heads=1),
    Case("padding attended as keys", "ring", (4, 1), segments=(13,)),
    Case("padding attended as keys after an exchange", "ring", (2, 2), segments=(13,)),
    Case("window ignored per hop", "ring", (4, 1), lower=-9, upper=0, segments=(64,)),
    Case("fully masked hop gives NaN", "ring", (4, 1), mask="first keys alone"),
    Case("cross attention sharded", "kv_gather", (4, 1), kv_segments=(19,), replicated_keys=True),
    # Two groups of the world, in both of which ranks count from 0.
    Case("global rank used as group rank", "ring", (2, 1), segments=(30,)),
    Case("global rank used as group rank, zigzag", "ring", (2, 1), zigzag=True, upper=0),
    Case("global rank used as group rank, hybrid", "ring", (2, 2), zigzag=True, upper=0),
    Case("global rank used as group rank, gathered", "kv_gather", (2, 1), zigzag=True, upper=0),
    Case("global rank used as group rank, heads", "ulysses", (1, 2), zigzag=True, upper=0),
)


def cases() -> list[Case]:
    found = []
    for world, meshes in DEGREES.items():
        for degrees, case in product(meshes, EVERYWHERE):
            for scheme in ("ulysses",) if degrees[0] == 1 else BLOCKS:
                found.append(replace(case, scheme=scheme, degrees=degrees, world=world))
        for degrees, case in product(meshes, WITH_RANK + REPLICATED):
            if degrees[1] == 1:
                found.append(replace(case, scheme="kv_gather", degrees=degrees, world=world))
    return found


def named(found: list[Case]) -> dict[str, Case]:
    table = {case.id: case for case in found}
    assert len(table) == len(found)
    return table


CASES = named(cases())
BUGS = named([replace(case, world=4) for case in KNOWN_BUGS])
