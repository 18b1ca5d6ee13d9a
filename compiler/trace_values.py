"""The masks of a call that is run: what data decided, beside what was proved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sgl_npu.compiler.harmless import harmless
from sgl_npu.compiler.trace import SiteTrace, Trace
from sgl_npu.compiler.trace_raster import of_tensor
from sgl_npu.compiler.watch import Watcher

_SAMPLES = 4  # of a batch


def mask_watchers(graph: fx.Graph, trace: Trace) -> dict[fx.Node, Watcher]:
    """For every node that is a mask of a site: what to call with its value."""
    sites: dict[str, list[SiteTrace]] = {}
    for site in trace.sites.values():
        if site.mask_node and site.schedule is None:  # else it is a part on one rank
            sites.setdefault(site.mask_node, []).append(site)
    return {node: _watcher(sites[node.name]) for node in graph.nodes if node.name in sites}


def _watcher(sites: list[SiteTrace]) -> Watcher:
    @harmless
    def mask(args: tuple, kwargs: dict, value: Any) -> None:
        if isinstance(value, Tensor) and value.dtype is torch.bool and value.dim() >= 2:
            found = _pictures(value)
            for site in sites:
                site.seen = found

    return mask


@torch.no_grad()
def _pictures(mask: Tensor) -> list:
    four = mask[(None,) * (4 - mask.dim())]
    rows = [four[number, 0] for number in range(min(four.size(0), _SAMPLES))]
    captions = [f"sample {number}" if len(rows) > 1 else "" for number in range(len(rows))]
    return [of_tensor(x, caption) for x, caption in zip(rows, captions, strict=True)]
