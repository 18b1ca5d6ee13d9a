"""The sequences of a packed attention in the call that is run: how long they are is data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sgl_npu.compiler.harmless import harmless
from sgl_npu.compiler.trace import SiteTrace, Trace
from sgl_npu.compiler.trace_raster import of_tensor, points
from sgl_npu.compiler.watch import Watcher
from sgl_npu.passes.site import site_id
from sgl_npu.runtime.packed_attention import packed_attention, sequence_lengths

_ENDS, _KEYS = ("actual_seq_lengths", "actual_seq_qlen"), ("actual_seq_lengths_kv", "actual_seq_kvlen")


def packed_watchers(graph: fx.Graph, trace: Trace) -> dict[fx.Node, Watcher]:
    """For every node that is a packed attention: what notes its sequences."""
    sites = {number: site for number, site in trace.sites.items() if site.packed}
    nodes = ((node, site_id(node)) for node in graph.nodes if node.op == "call_function" and _has_lengths(node))
    return {node: _watcher(node, sites[number]) for node, number in nodes if number in sites}


def _has_lengths(node: fx.Node) -> bool:
    return node.target is packed_attention or any(name in node.kwargs for name in _KEYS)


def _watcher(node: fx.Node, site: SiteTrace) -> Watcher:
    @harmless
    def sequences(args: tuple, kwargs: dict, value: Any) -> None:
        spans = _spans(args, kwargs) if node.target is packed_attention else _spans_of_kernel(args, kwargs)
        lengths = ((rows[1] - rows[0], keys[1] - keys[0]) for rows, keys in spans)
        site.sequences = tuple(pair for pair in lengths if any(pair))
        site.seen = [of_tensor(_allowed(site), "")]

    return sequences


def _spans(args: tuple, kwargs: Mapping[str, Any]) -> list:
    return sequence_lengths(args[3], args[4], (*args, None)[5] is not None or kwargs.get("block_table") is not None)


def _spans_of_kernel(args: tuple, kwargs: Mapping[str, Any]) -> list:
    keys = next(kwargs[name] for name in _KEYS if name in kwargs)
    ends = next((kwargs[name] for name in _ENDS if name in kwargs), None)
    if ends is None:  # as many queries of each sequence
        rows = args[0].size(1)
        ends = [rows * (number + 1) for number in range(len(keys))]
    return sequence_lengths(ends, keys, kwargs.get("block_table") is not None)


def _allowed(site: SiteTrace) -> torch.Tensor:
    """Bool: what is looked at of the queries, end to end, by that of the keys, end to end."""
    with unset_fake_temporarily():
        rows, keys = (_places([pair[side] for pair in site.sequences]) for side in (0, 1))
        lengths = torch.tensor(site.sequences)
        shift = (lengths[:, 1] - lengths[:, 0])[rows[0]]
        distance = keys[1][None] - (rows[1] + shift)[:, None]
        allowed = rows[0][:, None] == keys[0][None]
        before, after = site.packed_sides
        if before is not None:
            allowed &= distance >= -before
        return allowed & (distance <= after) if after is not None else allowed


def _places(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each index that is looked at: its sequence, and where it is in it."""
    ends = torch.tensor(lengths).cumsum(0)
    at = points(int(ends[-1]))
    number = torch.searchsorted(ends, at, right=True)
    return number, at - (ends - torch.tensor(lengths))[number]
