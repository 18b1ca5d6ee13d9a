"""Which attentions of a graph get a sparse kernel: those over all tokens of a video, in the layers the user names.

Everything is decided before the graph changes. The kernel itself is tried by `select`, before those of the platform,
and a site that gets none has the reason among its refusals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import fx

from sgl_npu.lowering.kernel import AttentionCall, Kernel
from sgl_npu.lowering.sparse.setting import SparseSetting
from sgl_npu.lowering.sparse.table import sparse_kernel
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.passes.grid_evidence import GridEvidence
from sgl_npu.passes.self_attention import is_self_attention
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.passes.token_grid import Contradiction, find_grid
from sgl_npu.runtime.sizes import Size


class GridError(ValueError):
    """The user's numbers contradict the graph: the message names the values, the rule and the remedy."""


class SparseKernels:
    """The sparse kernel of every site of a graph, or what refuses it. `lengths`: of those that have become sparse.

    Raises GridError where the user's numbers contradict every grid in the graph.
    """

    def __init__(
        self, graph: fx.Graph, sites: Sequence[AttentionSite], setting: SparseSetting, platform: str, kind: str
    ) -> None:
        self.setting, self.platform, self.kind = setting, platform, kind
        self.lengths: list[Size] = []
        self.sites = {site.node: _length(site) for site in sites}
        evidence = GridEvidence()
        found = {site.node: _grid(graph, site, setting, evidence) for site in sites}
        _refuse_contradiction(list(found.values()))
        self.grids = {node: grid.reason if isinstance(grid, Refusal) else grid for node, grid in found.items()}

    def first(self, site: AttentionSite, call: AttentionCall) -> Sequence[Kernel]:
        """What `select` tries before the platform's kernels."""
        kernel = sparse_kernel(self.setting, self.platform, self.grids[site.node], call)
        return (kernel if self.kind == "inference" else replace(kernel, refuse=_differentiated),)

    def describe(self, site: AttentionSite) -> None:
        """Note in the record of a site that has become sparse what that means."""
        if site.record.kernel == self.setting.method:
            self.lengths.append(self.sites[site.node])
            site.record.sparse = _text(self.setting, self.grids[site.node])


def _differentiated(call: AttentionCall) -> str:
    return "the graph is differentiated: sparse kernels have no backward"


def _length(site: AttentionSite) -> Size:
    query = site.tensor("query")
    assert query is not None
    return query.size(2)


def _grid(
    graph: fx.Graph, site: AttentionSite, setting: SparseSetting, evidence: GridEvidence
) -> TokenGrid | Refusal | None:
    """Where the site's video is, or why it gets no sparse kernel; None where the method needs no grid."""
    if not any(fnmatchcase(site.record.module, layer) for layer in setting.layers):
        return Refusal(f"its module {site.record.module!r} matches none of layers = {', '.join(setting.layers)}")
    query, key = site.argument("query"), site.argument("key")
    assert query is not None and key is not None
    if not is_self_attention(query, key):
        return Refusal("its queries and keys are not projections of the same tokens")
    return find_grid(graph, site, setting.grid, evidence) if setting.needs_grid else None


def _refuse_contradiction(found: Sequence[TokenGrid | Refusal | None]) -> None:
    """Raise GridError if what the user says of the text fits no attention: one that it does not fit may be meant."""
    contradiction = next((x for x in found if isinstance(x, Contradiction)), None)
    if contradiction is not None and not any(isinstance(x, TokenGrid) for x in found):
        raise GridError(
            f"attention_config: {contradiction.reason}; leave text_len and prefix out, which the graph says here, or "
            "name the modules in layers that they are meant for"
        )


def _text(setting: SparseSetting, grid: TokenGrid | str | None) -> str:
    if not isinstance(grid, TokenGrid):
        return "all tokens"
    around = ((grid.before, "before"), (grid.after, "after"))
    text = "".join(f", {count} tokens {place}" for count, place in around if str(count) != "0")
    shape = f"{grid.frames} x {grid.height} x {grid.width}"
    return f"sparsity {float(setting.sparsity):g} over {shape}{text} ({grid.source})"
