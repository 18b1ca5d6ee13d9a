"""What `explain` keeps of every attention beside its record: sizes at hand, the graph around it, the steps it took.

Text and numbers only: nothing here keeps a graph, a node or a tensor alive. An ordinary compilation keeps none of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from sgl_npu.lowering.sequence.schedule import Schedule


@dataclass(frozen=True)
class Raster:
    """Which of the pairs of a query and a key may meet, as a picture: a digit for each cell, 0 none to 4 all of it.

    `lines` are separated by newlines, queries downwards. A raster of one line holds for every query.
    """

    caption: str
    lines: str


@dataclass
class SiteTrace:
    """One attention as it was compiled. Sizes are those of the call at hand, where they are symbols.

    `lower` and `upper` are the proved band, None for no bound. `mask_given` and `mask_kept` are the mask as the model
    has it and what is left of it as a tensor, "" for none, `mask_bytes` their bytes; `mask_node` is the name of the
    latter in the graph. `condition` is what is left of the mask as a formula of i and j, "" where data decides.
    `raster` is its picture, `seen` the mask of the call that was run. `kernel_mask` is what the kernel gets as a mask
    of rows and columns beyond `mask_kept`, "" for nothing, `kernel_mask_bytes` its bytes, and `kernel_mask_sites` how
    many attentions share it. `before` and `after` are the graph around the site, `steps` what each pass did to it.

    Of `packed` sequences a query attends from `packed_sides[0]` keys before its own position to `packed_sides[1]`
    behind it, None for all; `sequences` are the numbers of queries and keys of each in the call that was run.
    """

    query: tuple[int, ...] = ()
    key: tuple[int, ...] = ()
    value: tuple[int, ...] = ()
    lower: int | None = None
    upper: int | None = None
    mask_given: str = ""
    mask_kept: str = ""
    mask_bytes: tuple[int, int] = (0, 0)
    mask_node: str = ""
    kernel_mask: str = ""
    kernel_mask_bytes: int = 0
    kernel_mask_sites: int = 0
    condition: str = ""
    raster: Raster | None = None
    seen: list[Raster] = field(default_factory=list)
    packed: bool = False
    packed_sides: tuple[int | None, int | None] = (None, None)
    sequences: tuple[tuple[int, int], ...] = ()
    before: str = ""
    after: str = ""
    steps: dict[str, str] = field(default_factory=dict)
    schedule: Schedule | None = None


@dataclass
class LayerCost:
    """What one layer's ops write, views left out. `squares` counts tensors by their last two sizes: number, bytes.

    Activations, whose columns are those of a projection, are not among the latter.
    """

    ops: int = 0
    bytes: int = 0
    squares: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


@dataclass
class Trace:
    """Of a report: the sites by id, and the cost of every layer before the passes and after them."""

    sites: dict[int, SiteTrace] = field(default_factory=dict)
    before: dict[str, LayerCost] = field(default_factory=dict)
    after: dict[str, LayerCost] = field(default_factory=dict)

    def site(self, number: int) -> SiteTrace:
        return self.sites.setdefault(number, SiteTrace())

    def renumbered(self, numbers: dict[int, int]) -> Trace:
        return replace(self, sites={numbers[old]: site for old, site in self.sites.items() if old in numbers})


def merged_traces(parts: Iterable[Trace]) -> Trace:
    """The traces of several graphs, whose sites are numbered through."""
    whole = Trace()
    for part in parts:
        whole.sites |= part.sites
        for own, theirs in ((whole.before, part.before), (whole.after, part.after)):
            for layer, cost in theirs.items():
                own[layer] = _sum(own[layer], cost) if layer in own else cost
    return whole


def _sum(one: LayerCost, other: LayerCost) -> LayerCost:
    squares = dict(one.squares)
    for sizes, (count, size) in other.squares.items():
        before = squares.get(sizes, (0, 0))
        squares[sizes] = before[0] + count, before[1] + size
    return LayerCost(one.ops + other.ops, one.bytes + other.bytes, squares)
