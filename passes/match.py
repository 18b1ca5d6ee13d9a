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

from sgl_npu.passes.axes import axes_of, in_order, through, view_chain
from sgl_npu.passes.constants import CASTS, is_float_cast
from sgl_npu.passes.fx_ops import aten, move_users_after, same_value
from sgl_npu.passes.inline import conform, trace_before
from sgl_npu.passes.mask import MaskProver
from sgl_npu.passes.match_channels import runs_over_features
from sgl_npu.passes.match_fills import joined, settled
from sgl_npu.passes.match_fold import Lead, folded_lead
from sgl_npu.passes.match_guards import RowStep, without_share
from sgl_npu.passes.match_lead import choose_lead, in_four_dims, unrepeated
from sgl_npu.passes.match_operands import Operand, find_operand
from sgl_npu.passes.match_output import Product, Result, read_product, read_result
from sgl_npu.passes.match_scores import Factor, Scores, read_scores
from sgl_npu.passes.match_softmax import Softmax
from sgl_npu.passes.match_terms import Term, shaped
from sgl_npu.passes.site import Refusal, SiteRecord, mark_site
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import known


@dataclass(frozen=True)
class Views:
    """The operands as (B, H, S, D), and the node that the output takes the place of. `lead` is (B, H)."""

    lead: Lead
    query: Operand
    key: Operand
    value: Operand
    result: Result


@dataclass(frozen=True)
class Match:
    """One attention: its scores, what becomes of the output's rows, its operands, and the dtype to compute in.

    `fill`: the number that fills all scores of a row without keys, which so gets the average of all values; None where
    such a row is 0.
    """

    scores: Scores
    fill: float | None
    steps: tuple[RowStep, ...]
    views: Views
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        return self.scores.scale * self.views.query.scale * self.views.key.scale


@dataclass
class Rewriting:
    """What the rewrites of one graph share: the graph, its table of decompositions, and the ops inserted so far."""

    gm: GraphModule
    decompositions: Any
    seen: dict = field(default_factory=dict)


def match(softmax: Softmax, prover: MaskProver, preserve_empty_rows: bool) -> Match | Refusal:
    """Everything that a rewrite needs, or where and why it is none. `prover` knows which rows may be without keys."""
    scores = read_scores(softmax)
    if isinstance(scores, Refusal):
        return scores
    product = read_product(softmax, scores)
    if isinstance(product, Refusal):
        return product
    views = _views(scores, product)
    if isinstance(views, Refusal):
        return views
    steps, has_sinks = product.steps, scores.sinks is not None
    if scores.sinks is not None:
        sinks = _per_head(scores.sinks, views.lead)
        if sinks is None:
            steps = (RowStep(scores.sinks, scores.levels[0], without_share), *steps)
        scores = replace(scores, sinks=sinks)
    foreign = next((term for term in product.blanks if not any(_same_mask(term, x) for x in scores.terms)), None)
    if foreign is not None:
        return Refusal("the probabilities are masked by something that the scores were not masked by", foreign.node)
    terms = _settled(scores, product, prover, has_sinks or not preserve_empty_rows)
    if isinstance(terms, Refusal):
        return terms
    settled_terms, fill = terms
    return Match(replace(scores, terms=settled_terms), fill, steps, views, _dtype(views, product))


def _views(scores: Scores, product: Product) -> Views | Refusal:
    """Query, key and value behind the views that the products want, and the output behind those that follow."""
    assert scores.product is not None
    left, right = scores.product[::-1] if scores.swapped else scores.product
    if runs_over_features(product.value, -1 if product.transposed else -2) and runs_over_features(left, -2):
        return Refusal("queries and keys are features of a linear map or a convolution: channel attention", left)
    fold, batches = scores.fold, (scores.batch, product.batch)
    lead = kv_lead = choose_lead((*scores.levels, *product.levels), (left, right, product.value))
    narrow: tuple[fx.Node, ...] | None = None
    if fold is not None:
        leads = folded_lead(scores.levels[0][:-2], fold)
        if leads is None or not fold.matches(product.fold):
            return Refusal("heads are folded into the rows of one product and not of the other", product.node)
        lead, kv_lead = leads
    elif (grouped := unrepeated((right, product.value), batches, scores.levels[0][:-2])) is not None:
        narrow, lead, kv_lead = grouped
    query = find_operand(left, lead, scores.swapped, fold=fold, batch=batches[0])
    if narrow is None:
        key = find_operand(right, kv_lead, not scores.swapped, batch=batches[0])
        value = find_operand(product.value, kv_lead, product.transposed, scaled=False, batch=batches[1])
    else:
        key = find_operand(narrow[0], kv_lead, not scores.swapped)
        value = find_operand(narrow[1], kv_lead, product.transposed, scaled=False)
    result = read_result(product, lead, kv_lead)
    for name, found, node in (
        ("query", query, left), ("key", key, right), ("value", value, product.value), ("output", result, product.node),
    ):  # fmt: skip
        if found is None:
            shape = tuple(node.meta["val"].shape)
            return Refusal(f"the {name} {shape} is no view of {lead[0]} x {lead[1]} batches and heads", node)
    assert query is not None and key is not None and value is not None and result is not None
    return Views(lead, query, key, value, result)


def _settled(
    scores: Scores, product: Product, prover: MaskProver, rows_are_free: bool
) -> tuple[tuple[Term, ...], float | None] | Refusal:
    """The terms as masks and biases, and what fills rows without keys; `product.blanks` and sinks make them 0."""
    fills = [term for term in scores.terms if term.is_mask and term.fills]
    blanked = [term for term in fills if any(_same_mask(term, x) for x in product.blanks)]
    rows_are_free = rows_are_free or bool(blanked and len(blanked) == len(fills))
    if rows_are_free and not scores.lse:
        return scores.terms, None
    found = settled(scores.terms, prover)
    if rows_are_free and found != (scores.terms, None):
        return Refusal("the logarithm of the sums of rows without keys would be another", product.node)
    if product.blanks and found != (scores.terms, None):
        return Refusal("the probabilities are masked again, but not by all masks of the scores", product.node)
    return found


def _same_mask(one: Term, other: Term) -> bool:
    same = (one.is_mask, one.negated, one.shaping) == (other.is_mask, other.negated, other.shaping)
    return same and same_value(one.node, other.node)


def _dtype(views: Views, product: Product) -> torch.dtype:
    """The dtype to compute in: that of the operands, and no narrower than the product unless its users narrow it."""
    dtypes = [operand.node.meta["val"].dtype for operand in (views.query, views.key, views.value)]
    common = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
    wanted = product.node.meta["val"].dtype
    users = views.result.node.users
    narrowed = all(user.target in CASTS and user.meta["val"].dtype == common for user in users)
    return common if narrowed and users else torch.promote_types(common, wanted)


def _per_head(column: fx.Node, lead: Lead) -> fx.Node | None:
    """The (1, H, 1, 1) that a column of sinks is the broadcast of."""
    node = column
    while is_float_cast(node) or view_chain(node)[1:]:
        chain = view_chain(node)
        axes = through(axes_of(chain[-1]), chain)
        if axes is None or not in_order(axes):
            return None
        node = chain[-1] if chain[1:] else node.args[0]
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
    views = match.views
    operands = (views.query, views.key, views.value)
    steps = [step.node for step in match.steps if isinstance(step.node, fx.Node)]
    others = [*(x.node for x in scores.factors), *(x.node for x in scores.terms), *steps]
    anchor, logarithms = views.result.node, scores.lse
    nodes = [*(x.node for x in operands), *others, *([] if scores.sinks is None else [scores.sinks])]

    def run(*values: Any) -> tuple[Tensor, ...]:
        out, lse, finished = _attend(match, values)
        with disable_proxy_modes_tracing():
            like, shaped = anchor.meta["val"], [x.meta["val"] for x in logarithms]
        result = conform(views.result.build(finished.to(like.dtype)), like)
        if match.fill is not None and shaped:
            keys = torch.full((), views.key.shape[2], dtype=lse.dtype, device=lse.device)
            lse = torch.where(lse == -torch.inf, keys.log() + match.fill, lse)
        return result, out, *(conform(lse.reshape(x.shape).to(x.dtype), x) for x in shaped)

    result, out, *rest = trace_before(rewriting.gm, anchor, run, nodes, rewriting.decompositions, rewriting.seen)
    assert result is not None and out is not None
    node = out.args[0]
    assert isinstance(node, fx.Node) and node.target is attention
    mark_site(node, record)
    record.averages_empty_rows = match.fill is not None
    anchor.replace_all_uses_with(result)
    for old, new in zip(logarithms, rest, strict=True):
        assert new is not None
        old.replace_all_uses_with(new)
        move_users_after(new, anchor)


def _attend(match: Match, values: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The canonical op's out and lse, and what the model makes of out's rows. `values` are those of the nodes above."""
    scores, views, lead = match.scores, match.views, match.views.lead
    query, key, value = (
        operand.build(x).to(match.dtype)
        for operand, x in zip((views.query, views.key, views.value), values, strict=False)
    )
    rest = list(values[3:])
    factors = [_multiplication(factor, rest.pop(0), lead) for factor in scores.factors]
    for multiply in factors:
        query = multiply(query).to(match.dtype)
    tensors = [in_four_dims(shaped(rest.pop(0), term.shaping), term.level, lead) for term in scores.terms]
    mask, bias = joined(scores.terms, tensors, factors, match.dtype)
    inputs = [rest.pop(0) if isinstance(step.node, fx.Node) else step.node for step in match.steps]
    sinks = None if scores.sinks is None else rest.pop(0).reshape(-1)
    out, lse = attention(query, key, value, mask, bias, sinks, scale=match.scale, softcap=scores.softcap)
    finished = out
    for step, x in zip(match.steps, inputs, strict=True):
        finished = step.apply(finished, in_four_dims(x, step.level, lead) if isinstance(x, Tensor) else x, lse)
    return out, lse, finished


def _multiplication(factor: Factor, x: Any, lead: Lead) -> Callable[[Tensor], Tensor]:
    x = in_four_dims(x, factor.level, lead) if isinstance(x, Tensor) else x
    return lambda scores: scores / x if factor.divides else scores * x
