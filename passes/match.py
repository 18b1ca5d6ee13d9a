"""Attention that is written out as a formula becomes the canonical op, whatever its spelling.

before: bmm(q, k^T) → scale, mask, bias, softcap, sinks, casts, views → softmax → casts, views → bmm(p, v) → views
after:  sgl_npu::attention(q, k, v, mask, bias, sinks, scale=..., softcap=...) → views

The anchor is the softmax. From it `match_scores.py` goes back to the product of query and key and puts everything
between into one normal form, `match_output.py` goes on to the product with the value, and `match_operands.py` finds
query, key and value as (B, H, S, D) behind the views that a batched product wants. What does not fit is a Refusal
that names it.

Only graphs that nobody differentiates are rewritten: a backward needs the probabilities of its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.graph_module import GraphModule

from sgl_npu.passes.axes import view_chain
from sgl_npu.passes.constants import CASTS
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.inline import conform, trace_before
from sgl_npu.passes.match_lead import Lead, choose_lead, in_four_dims, unrepeated
from sgl_npu.passes.match_operands import Operand, find_operand
from sgl_npu.passes.match_output import Product, Result, read_product, read_result
from sgl_npu.passes.match_scores import Factor, Scores, read_scores
from sgl_npu.passes.match_terms import joined, shaped
from sgl_npu.passes.near_miss import SPELLING
from sgl_npu.passes.site import Refusal, SiteRecord, mark_site, site_id, where
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import known

SOFTMAXES = (aten._softmax.default, aten._safe_softmax.default)


@dataclass(frozen=True)
class Match:
    """One attention: its scores, its operands as (B, H, S, D), and the node that its output takes the place of."""

    softmax: fx.Node
    scores: Scores
    lead: Lead
    query: Operand
    key: Operand
    value: Operand
    dtype: torch.dtype
    result: Result

    @property
    def scale(self) -> float:
        return self.scores.scale * self.query.scale * self.key.scale


@dataclass
class Rewriting:
    """What the rewrites of one graph share: the graph, its table of decompositions, and the ops inserted so far."""

    gm: GraphModule
    decompositions: Any
    seen: dict = field(default_factory=dict)


def softmaxes(graph: fx.Graph, records: dict[int, SiteRecord]) -> list[fx.Node]:
    """The softmaxes that are written out: not those of a call that capture has refused and left to torch."""
    found = [node for node in graph.nodes if node.target in SOFTMAXES]
    refused = {number for number, record in records.items() if record.spelling != SPELLING}
    return [node for node in found if site_id(node) not in refused]


def share_sizes(graph: fx.Graph) -> None:
    """Read every size off the first node that has it: one read off the scores would be a user of the scores."""
    first: dict[str, fx.Node] = {}
    tensors: dict[str, tuple[fx.Node, int]] = {}
    start = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                tensors.setdefault(str(size), (node, dim))
        elif isinstance(value, torch.SymInt) and (node.op == "placeholder" or node.target is aten.sym_size.int):
            name = str(value)
            if name not in first:
                first[name] = node if node.op == "placeholder" else _size_of(*tensors[name], node, start)
            if first[name] is not node:
                node.replace_all_uses_with(first[name])
    graph.eliminate_dead_code()


def _size_of(source: fx.Node, dim: int, node: fx.Node, start: fx.Node) -> fx.Node:
    """The size that `node` reads, read off `source`, which comes earlier."""
    if node.args[0] is source:
        return node
    with source.graph.inserting_before(start if source.op == "placeholder" else source.next):
        size = source.graph.call_function(aten.sym_size.int, (source, dim))
    size.meta.update(node.meta)
    return size


def record_of(softmax: fx.Node, records: dict[int, SiteRecord]) -> SiteRecord | None:
    """The record that capture has made for a softmax, if it made one."""
    found = site_id(softmax)
    return None if found is None else records.get(found)


def new_record(softmax: fx.Node, records: dict[int, SiteRecord]) -> SiteRecord:
    record = SiteRecord(max(records, default=-1) + 1, SPELLING, *where(softmax))
    records[record.id] = record
    return record


def match(softmax: fx.Node) -> Match | Refusal:
    dim, rank = softmax.args[1], softmax.meta["val"].dim()
    if rank < 2 or dim % rank != rank - 1:
        return Refusal(f"a softmax over dimension {dim} of {rank}: attention's is over the last, the keys", softmax)
    scores = read_scores(softmax)
    if isinstance(scores, Refusal):
        return scores
    product = read_product(softmax, scores)
    if isinstance(product, Refusal):
        return product
    assert scores.product is not None
    left, right = scores.product
    size, rows = left.meta["val"].size(-1), left.meta["val"].size(-2)
    if isinstance(size, torch.SymInt) and isinstance(rows, int) and rows > 1:
        return Refusal(f"the scores sum over a length, {size}, and not over a head size: channel attention", left)
    lead = kv_lead = choose_lead((*scores.levels, *product.levels), (left, right, product.value))
    repeated = unrepeated(right), unrepeated(product.value)
    key_node, value_node = right, product.value
    if repeated[0] is not None and repeated[1] is not None and len(scores.levels[0]) == 5:
        (key_node, kv_lead), value_node = repeated[0], repeated[1][0]
        lead = kv_lead[0], scores.levels[0][1] * scores.levels[0][2]
    query, key = find_operand(left, lead, False), find_operand(key_node, kv_lead, True)
    value = find_operand(value_node, kv_lead, product.transposed, scaled=False)
    result = read_result(product, lead)
    for name, found, node in (
        ("query", query, left), ("key", key, right), ("value", value, product.value), ("output", result, product.node),
    ):  # fmt: skip
        if found is None:
            shape = tuple(node.meta["val"].shape)
            return Refusal(f"the {name} {shape} is no view of {lead[0]} x {lead[1]} batches and heads", node)
    assert query is not None and key is not None and value is not None and result is not None
    if scores.sinks is not None:
        sinks = _per_head(scores.sinks, lead)
        if sinks is None:
            return Refusal("the column beside the scores is not one number per head", scores.sinks)
        scores = replace(scores, sinks=sinks)
    return Match(softmax, scores, lead, query, key, value, _dtype((query, key, value), product, result), result)


def _dtype(operands: tuple[Operand, ...], product: Product, result: Result) -> torch.dtype:
    """The dtype to compute in: that of the operands, and no narrower than the product unless its users narrow it."""
    dtypes = [operand.node.meta["val"].dtype for operand in operands]
    common = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
    wanted = product.node.meta["val"].dtype
    narrowed = all(user.target in CASTS and user.meta["val"].dtype == common for user in result.node.users)
    return common if narrowed and result.node.users else torch.promote_types(common, wanted)


def _per_head(column: fx.Node, lead: Lead) -> fx.Node | None:
    """The (1, H, 1, 1) that a column of sinks is the broadcast of."""
    node = column
    while node.target in CASTS or view_chain(node)[1:]:
        node = node.args[0]
    if node.target is aten.expand.default:
        node = node.args[0]
    sizes = node.meta["val"].shape
    wanted = (1, lead[1], 1, 1)
    padded = (1,) * (4 - len(sizes)) + tuple(sizes)
    same = len(padded) == 4 and all(known(a == b) for a, b in zip(padded, wanted, strict=True))
    return node if same and column.meta["val"].dim() == 4 else None


def rewrite(match: Match, record: SiteRecord, rewriting: Rewriting) -> None:
    """Put the canonical op and the views of its output where the last view of the product was."""
    scores = match.scores
    operands = (match.query, match.key, match.value)
    others = [*(x.node for x in scores.factors), *(x.node for x in scores.terms)]
    anchor = match.result.node
    nodes = [*(x.node for x in operands), *others, *([] if scores.sinks is None else [scores.sinks])]
    symbols = [x for x in anchor.graph.find_nodes(op="placeholder") if isinstance(x.meta.get("val"), torch.SymInt)]

    def run(*values: Any) -> tuple[Tensor, Tensor]:
        out = _attend(match, values)
        with disable_proxy_modes_tracing():
            like = anchor.meta["val"]
        return conform(match.result.build(out.to(like.dtype)), like), out

    result, out = trace_before(rewriting.gm, anchor, run, [*nodes, *symbols], rewriting.decompositions, rewriting.seen)
    assert result is not None and out is not None
    node = out.args[0]
    assert isinstance(node, fx.Node) and node.target is attention
    mark_site(node, record)
    anchor.replace_all_uses_with(result)


def _attend(match: Match, values: tuple[Any, ...]) -> Tensor:
    """The canonical op on the values of its operands, factors, terms and sinks, in this order."""
    scores, lead = match.scores, match.lead
    query, key, value = (
        operand.build(x).to(match.dtype)
        for operand, x in zip((match.query, match.key, match.value), values, strict=False)
    )
    rest = list(values[3:])
    factors = [_multiplication(factor, rest.pop(0), lead) for factor in scores.factors]
    for multiply in factors:
        query = multiply(query).to(match.dtype)
    tensors = [in_four_dims(shaped(rest.pop(0), term.shaping), term.level, lead) for term in scores.terms]
    mask, bias = joined(scores.terms, tensors, factors)
    sinks = None if scores.sinks is None else rest.pop(0).reshape(-1)
    return attention(query, key, value, mask, bias, sinks, scale=match.scale, softcap=scores.softcap)[0]


def _multiplication(factor: Factor, x: Any, lead: Lead) -> Callable[[Tensor], Tensor]:
    x = in_four_dims(x, factor.level, lead) if isinstance(x, Tensor) else x
    return lambda scores: scores / x if factor.divides else scores * x
