"""Attention among the tokens of documents that lie end to end, known by ids, as attention over packed sequences.

before: attention(q (B, H, S, D), k, v, ids[b, i] == ids[b, j] and position[b, j] <= position[b, i])
after:  forward(…, end_0, …): packed_attention(q (B * S, H, D), k, v, [end_0, …, B * S], [end_0, …, B * S], after=0)

The kernels want to know where the documents end, as numbers, so these are read from the ids before the graph runs. It
is looked at then that a document is one run of equal ids, that positions grow by 1 in it, and that there are not too
many: for other ids whoever runs the graph has another form of it, with the mask. What the list has too many entries for
are empty documents at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.graph_module import GraphModule

from sgl_npu.lowering.ascend_packed import takes_packed
from sgl_npu.lowering.packed import PackedCall
from sgl_npu.passes.document_masks import Documents, documents_of
from sgl_npu.passes.document_reader import MOST_DOCUMENTS, Reader, add_ends, is_readable, reader, source_of
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.inline import conform, trace_before
from sgl_npu.passes.mask import MaskProver
from sgl_npu.passes.select import replace_outputs
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.packed_attention import packed_attention


@dataclass(frozen=True)
class Match:
    site: AttentionSite
    documents: Documents


def may_match(graph: fx.Graph) -> bool:
    """Whether anything in the graph is compared for equality, as ids are."""
    compare = (aten.eq.Tensor, aten.ne.Tensor)
    return any(True for target in compare for _ in graph.find_nodes(op="call_function", target=target))


def match(site: AttentionSite, prover: MaskProver) -> Match | Refusal:
    found = documents_of(site, prover)
    if isinstance(found, Refusal):
        return found
    if not is_readable(source_of(found)):
        return Refusal("ids or positions are not a few ops on the integers that the graph is given", found.ids.node)
    if not takes_packed(_packed_call(site, found), MOST_DOCUMENTS):
        return Refusal("no kernel for packed sequences takes these tensors", site.node)
    return Match(site, found)


def rewrite(matches: Sequence[Match], gm: GraphModule, decompositions: Mapping[Any, Any]) -> Reader:
    """Put packed attention in the place of every match. The graph gets the ends as further inputs, behind the others.

    Returns what reads them from the other inputs, or None where the graph with the masks has to run.
    """
    sources = list(dict.fromkeys(source_of(match.documents) for match in matches))
    read = reader(gm, sources)
    ends = {source: add_ends(gm.graph, source) for source in sources}
    seen: dict[Any, Any] = {}
    for match in matches:
        _pack(match, ends[source_of(match.documents)], gm, decompositions, seen)
    gm.graph.eliminate_dead_code()
    return read


def _pack(match: Match, ends: Sequence[fx.Node], gm: GraphModule, decompositions: Mapping[Any, Any], seen: Any) -> None:
    site, options = match.site, _options(match.site, match.documents)
    named = {name: node for name in ("query", "key", "value", "sinks") if (node := site.argument(name)) is not None}

    def run(*values: Any) -> tuple[Tensor, ...]:
        given = dict(zip(named, values, strict=False))
        batch, tokens = given["query"].size(0), given["query"].size(2)
        packed = [_end_to_end(given[name]) for name in ("query", "key", "value")]
        everything = [*values[len(named) :], batch * tokens]
        results = packed_attention(*packed, everything, everything, None, given.get("sinks"), **options)
        rows = (x.unflatten(0, (batch, tokens)).transpose(1, 2) for x in results)
        return tuple(conform(x, like) for x, like in zip(rows, site.node.meta["val"], strict=True))

    results = trace_before(gm, site.node, run, [*named.values(), *ends], decompositions, seen)
    site.record.tensor_mask = "documents"
    replace_outputs(gm.graph, site.node, results)


def _end_to_end(x: Tensor) -> Tensor:
    """(B, H, S, D) as (B * S, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def _options(site: AttentionSite, documents: Documents) -> dict[str, Any]:
    kept = {name: site.node.kwargs[name] for name in ("scale", "softcap") if name in site.node.kwargs}
    return {**kept, "before": documents.before, "after": documents.after}


def _packed_call(site: AttentionSite, documents: Documents) -> PackedCall:
    """The call as `takes_packed` wants it, of all tokens as one sequence."""
    query, key, value = (_end_to_end(x) for name in ("query", "key", "value") if (x := site.tensor(name)) is not None)
    return PackedCall(
        query,
        key,
        value,
        [query.size(0)],
        [key.size(0)],
        sinks=site.tensor("sinks"),
        needs_lse=site.output(1) is not None,
        **_options(site, documents),
    )
