"""Give queries that may attend no key what the model's own formula gives them: the average of all values.

before: out, lse = attention(...)                       out is 0 where no key is left
after:  out = where(lse == -inf, mean(value), out)

A mask that fills scores with a finite number says so (`match_fills.py`). Where every query surely has a key, there is
nothing to do, and nobody pays for the lse: the mask prover has said so in the record.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.fx_ops import swapped_source
from sgl_npu.passes.inline import conform, trace_before
from sgl_npu.passes.mask_rows import NEVER
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.sizes import known


@dataclass(frozen=True)
class Match:
    """`out` is the output of the site, as (B, S, H, D) where `swapped`."""

    site: AttentionSite
    out: fx.Node
    swapped: bool


def match(site: AttentionSite) -> Match | Refusal:
    if not site.record.averages_empty_rows:
        return Refusal("the model gives 0 to a row without keys, or is free to", site.node)
    out = site.output(0)
    if out is None:
        return Refusal("nobody uses the output", site.node)
    value = site.tensor("value")
    assert value is not None
    if site.record.empty_rows == NEVER or known(value.size(2) == 0):
        return Refusal("every row keeps a key, or there are no keys", site.node)
    (user, *others) = out.users
    swapped = not others and swapped_source(user) is out
    return Match(site, user if swapped else out, swapped)


def rewrite(match: Match, gm: GraphModule, decompositions: Mapping[Any, Callable], seen: dict) -> None:
    node, out = match.site.node, match.out
    value = match.site.argument("value")
    assert value is not None
    lse = match.site.output(1) or _lse(node)
    anchor, like = max(out, lse).next, out.meta["val"]

    def run(out: Tensor, lse: Tensor, value: Tensor) -> tuple[Tensor]:
        mean = value.mean(2, keepdim=True)
        if not known(lse.size(1) == value.size(1)):
            mean = mean.repeat_interleave(lse.size(1) // value.size(1), dim=1)
        empty = (lse == float("-inf")).unsqueeze(-1)
        if match.swapped:
            empty, mean = empty.transpose(1, 2), mean.transpose(1, 2)
        return (conform(torch.where(empty, mean, out), like),)

    users = list(out.users)
    (result,) = trace_before(gm, anchor, run, [out, lse, value], decompositions, seen)
    assert result is not None
    for user in users:
        user.replace_input_with(out, result)


def _lse(node: fx.Node) -> fx.Node:
    with node.graph.inserting_after(node):
        lse = node.graph.call_function(operator.getitem, (node, 1))
    lse.meta["val"] = node.meta["val"][1]
    return lse
