"""Split, RMS norm per head and rotary embedding of query, key and value as one op.

before: linear → split → view (B, S, N, D) → x * rsqrt(mean(x²) + eps) * weight → x * cos + rotate(x) * sin → attention
after:  linear → sgl_npu::split_qkv_rmsnorm_rope(qkv, sin, cos, ...) → views → attention

What the channels of query and key are computed from decides, not how it is written (`channel_rules`). The key is found
behind the caches that it is written to. cos and sin are brought into the kernel's form once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph_module import GraphModule

from sgl_npu.passes import merge_projections
from sgl_npu.passes.channel_walk import Channels
from sgl_npu.passes.channels import CHANNEL, HEAD, ROW, SAMPLE, Stuck, Values
from sgl_npu.passes.fx_ops import move_users_after
from sgl_npu.passes.inline import conform, signature, trace_before
from sgl_npu.passes.qkv_parts import Part, first_column, first_part, projected_only
from sgl_npu.passes.rotary import Rotation, rotation
from sgl_npu.passes.rotary_tables import Table, table
from sgl_npu.passes.site import AttentionSite, Refusal
from sgl_npu.runtime.npu.rule import broken_rules
from sgl_npu.runtime.npu.split_qkv_rmsnorm_rope import SPLIT_RULES, SplitCall, installed_clause
from sgl_npu.runtime.sizes import Size, known


@dataclass(frozen=True)
class Match:
    """Query, key and value, and how the first two are rotated."""

    parts: tuple[Part, Part, Part]
    rotation: Rotation
    cos: Table
    sin: Table
    head_dim: int

    @property
    def inputs(self) -> list[fx.Node]:
        """What the fused op reads, each node once."""
        tables = [run.node for table in (self.cos, self.sin) for run in table.runs]
        learned = [x for part in self.parts[:2] for x in (part.heads.weight, part.heads.bias) if x is not None]
        return list(dict.fromkeys([*(part.columns for part in self.parts), *tables, *learned]))

    @property
    def alike(self) -> Any:
        """Equal for layers that are computed in the same way from inputs of their own."""
        number: dict[fx.Node | None, int] = {node: i for i, node in enumerate(self.inputs)}
        parts = []
        for p in self.parts:
            h = p.heads
            heads = (h.count, h.stride, h.eps, h.labels, number.get(h.weight), number.get(h.bias))
            parts.append((number[p.columns], p.first, p.labels, heads, signature(p.node.meta["val"])))
        tables = [
            (x.repeats, *((number[run.node], run.labels, run.sign, run.start, run.step, run.count) for run in x.runs))
            for x in (self.cos, self.sin)
        ]
        return (*parts, *tables, self.rotation.is_neox_style, self.head_dim)

    @property
    def text(self) -> str:
        """What is fused, in words."""
        norm = "" if self.parts[0].heads.eps is None else "RMS norm, "
        size = "" if self.rotation.size == self.head_dim else f" of {self.rotation.size} of {self.head_dim} channels"
        return f"split, {norm}rotary embedding ({'halves' if self.rotation.is_neox_style else 'neighbours'}){size}"


def match(site: AttentionSite, walk: Channels, inner: str) -> Match | Refusal:
    query, key, value = (site.argument(name) for name in ("query", "key", "value"))
    assert query is not None and key is not None and value is not None
    head_dim = query.meta["val"].shape[-1]
    if not isinstance(head_dim, int) or value.meta["val"].shape[-1] != head_dim:
        return Refusal("heads of query and value differ in size, or the size is no constant")
    found: list[Part] = []
    turns: list[Rotation] = []
    for name, node in (("query", query), ("key", key)):
        one = _rotated(node, walk, head_dim)
        if isinstance(one, Stuck):
            return Refusal(f"{name}: {one.reason}")
        found.append(one[0])
        turns.append(one[1])
    plain = first_part(value, walk, projected_only)
    if isinstance(plain, Stuck):
        return Refusal(f"value: {plain.reason}")
    parts = (found[0], found[1], plain)
    reason = _disagreement(parts, turns, head_dim)
    if reason is not None:
        return Refusal(reason)
    cos, sin = (table(walk.factors, x, 1 if turns[0].is_neox_style else 2) for x in (turns[0].cos, turns[0].sin))
    if isinstance(cos, Stuck) or isinstance(sin, Stuck):
        return Refusal(next(x.reason for x in (cos, sin) if isinstance(x, Stuck)))
    result = Match(parts, turns[0], cos, sin, head_dim)
    return result if (clause := _clause(result, inner)) is None else Refusal(clause)


def _rotated(node: fx.Node, walk: Channels, head_dim: int) -> tuple[Part, Rotation] | Stuck:
    def turn_of(values: Values) -> Rotation | Stuck:
        turn = rotation(values, head_dim)
        found = turn if isinstance(turn, Stuck) else table(walk.factors, (*turn.cos, *turn.sin), 1)
        return found if isinstance(found, Stuck) else turn

    part = first_part(node, walk, turn_of)
    if isinstance(part, Stuck):
        return part
    turn = turn_of(part.values)
    assert isinstance(turn, Rotation)
    return part, turn


def _is_even(part: Part, head_dim: int) -> bool:
    """Whether a head of other parts follows each of its own: what is projected is cut into equal pieces then."""
    heads, size = part.heads, part.columns.meta["val"].shape[-1]
    return known(size == heads.count * heads.stride) and part.first + head_dim <= heads.stride


def _disagreement(parts: Sequence[Part], turns: Sequence[Rotation], head_dim: int) -> str | None:
    """What query, key and value do not have in common; the op has one setting for all of them."""
    query, key, value = parts
    if not all(part.is_dense or _is_even(part, head_dim) for part in parts):
        return "the heads are not equally far apart in the projection"
    if key.heads.count != value.heads.count:
        return "key and value have different numbers of heads"
    if _factors(turns[0]) != _factors(turns[1]):
        return "query and key are rotated differently"
    if query.heads.eps != key.heads.eps:
        return f"query and key are normalised with eps = {query.heads.eps} and {key.heads.eps}"
    if value.heads.eps is not None:
        return "the value is normalised"
    if (query.heads.bias is None) != (key.heads.bias is None):
        return "a norm of query or key has a bias and the other has none"
    dtype = query.columns.meta["val"].dtype
    if any(x.meta["val"].dtype != dtype for part in parts for x in (part.columns, part.node)) or dtype.itemsize > 4:
        return "the dtype is float64, or changes between the projection and the attention"
    if any(part.heads.normalised not in (None, (first_column(part.values), head_dim)) for part in parts):
        return "an RMS norm is over a part of the channels of a head"
    if value.values.size != head_dim:
        return "heads of query and value differ in size"
    rows = [part.rows for part in parts]
    shape = query.node.meta["val"].shape
    tokens: Size = 1
    for label in (SAMPLE, ROW):
        tokens = tokens * (shape[query.labels.index(label)] if label in query.labels else 1)
    if known(tokens == 0) or not known(rows[0] == tokens):
        return "there are no rows, or they are repeated on the way"
    if not all(known(rows[0] == x) for x in rows[1:]):
        return "query and key are projected from different numbers of rows"
    return None


def _factors(turn: Rotation) -> tuple[Any, ...]:
    """A rotation without where its heads start."""
    return turn.is_neox_style, turn.cos, turn.sin


def _clause(found: Match, inner: str) -> str | None:
    """The first rule of the kernel that the call breaks, or what to install. GE graphs have operators of their own."""
    query, key, _ = found.parts
    sizes = [part.heads.count * found.head_dim for part in (query, key)]
    rows = query.rows
    call = SplitCall(
        qkv=(rows, sizes[0] + 2 * sizes[1]),
        sin=(rows, found.rotation.size),
        cos=(rows, found.rotation.size),
        eps=query.heads.eps,
        weights=(None, None) if query.heads.eps is None else ((found.head_dim,), (found.head_dim,)),
        dtype=query.columns.meta["val"].dtype,
        q_hidden_size=sizes[0],
        kv_hidden_size=sizes[1],
        head_dim=found.head_dim,
    )
    broken = broken_rules(call, SPLIT_RULES)
    if broken:
        return broken[0][1]
    is_emulated = query.columns.meta["val"].device.type == "cpu"
    return None if is_emulated or inner == "torchair" else installed_clause(call, found.rotation.is_neox_style)


def rewrite(
    found: Match,
    gm: GraphModule,
    decompositions: Mapping[Any, Callable],
    seen: dict[Any, Any],
    merging: merge_projections.Match | Refusal | None = None,
) -> bool:
    """Put the op in, and one projection before it; False where what it reads is computed from what it would replace."""
    roots = [part.node for part in found.parts]
    last = max(found.inputs)
    if _depends(last, roots, found.inputs):
        return False
    if isinstance(merging, merge_projections.Match):
        parts = merge_projections.rewrite(merging, found.parts, gm, decompositions, seen)
        found = replace(found, parts=parts)
    inputs = found.inputs
    anchor = max(inputs).next
    while anchor.op == "placeholder":
        anchor = anchor.next
    old = [root.meta["val"] for root in roots]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        outs = _fused(found, dict(zip(inputs, given, strict=True)))
        return tuple(conform(x, like) for x, like in zip(outs, old, strict=True))

    new = trace_before(gm, anchor, run, inputs, decompositions, seen, found.alike)
    behind = anchor.prev
    for root, node in zip(roots, new, strict=True):
        assert node is not None
        root.replace_all_uses_with(node)
        move_users_after(node, behind)
    return True


def _depends(last: fx.Node, roots: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> bool:
    """Whether an input is computed from a root."""
    start = min(roots)
    after, pending = set(roots), list(roots)
    while pending:
        for user in pending.pop().users:
            if user not in after and start < user and not last < user:
                after.add(user)
                pending.append(user)
    return any(x in after for x in inputs)


def _fused(found: Match, given: dict[fx.Node, Tensor]) -> tuple[Tensor, ...]:
    query, key = found.parts[:2]
    shape = query.node.meta["val"].shape
    samples, length = (shape[query.labels.index(x)] if x in query.labels else 1 for x in (SAMPLE, ROW))
    cos, sin = (table.rows(given, samples, length) for table in (found.cos, found.sin))
    sizes = [part.heads.count * found.head_dim for part in found.parts]
    weights, biases = (
        [_learned(part, given, name, found.head_dim) for part in (query, key)] for name in ("weight", "bias")
    )
    outs = torch.ops.sgl_npu.split_qkv_rmsnorm_rope(
        _projected(found.parts, sizes, given), sin, cos, sizes[0], sizes[1], found.head_dim, query.heads.eps,
        *weights, *biases, found.rotation.is_neox_style,
    )  # fmt: skip
    return tuple(
        _placed(out, part, found.head_dim, samples, length) for out, part in zip(outs, found.parts, strict=True)
    )


def _learned(part: Part, given: dict[fx.Node, Tensor], name: str, head_dim: int) -> Tensor | None:
    node = getattr(part.heads, name)
    if node is not None:
        return given[node].reshape(head_dim)
    if name == "bias" or part.heads.eps is None:
        return None
    columns = given[part.columns]
    return torch.ones(head_dim, dtype=columns.dtype, device=columns.device)  # a norm without a weight


def _projected(parts: Sequence[Part], sizes: Sequence[int], given: dict[fx.Node, Tensor]) -> Tensor:
    """Query, key and value side by side, (T, columns): as they are projected, or joined."""
    nodes, firsts = {part.columns for part in parts}, [part.first for part in parts]
    is_packed = all(part.is_dense and part.heads.labels is None for part in parts) and firsts == [
        firsts[0],
        firsts[0] + sizes[0],
        firsts[0] + sizes[0] + sizes[1],
    ]
    if len(nodes) == 1 and is_packed:
        return _columns(given[parts[0].columns], firsts[0], sizes[0] + 2 * sizes[1])
    return torch.cat([_of_heads(given[p.columns], p, size) for p, size in zip(parts, sizes, strict=True)], -1)


def _of_heads(projected: Tensor, part: Part, size: int) -> Tensor:
    labels = part.heads.labels
    if labels is not None:
        wanted = (SAMPLE, ROW, HEAD, None, CHANNEL)
        order = sorted(range(projected.dim()), key=lambda dim: wanted.index(labels[dim]))
        return projected.permute(order).reshape(-1, size)
    if part.is_dense:
        return _columns(projected, part.first, size)
    heads = projected.reshape(-1, part.heads.count, part.heads.stride)
    return heads[..., part.first : part.first + size // part.heads.count].reshape(-1, size)


def _columns(projected: Tensor, first: int, size: int) -> Tensor:
    rows = projected if projected.dim() == 2 else projected.reshape(-1, projected.shape[-1])
    return rows if size == rows.shape[-1] else rows[:, first : first + size]


def _placed(out: Tensor, part: Part, head_dim: int, samples: Size, length: Size) -> Tensor:
    """(T, N * D) in the shape and order of what it replaces."""
    sizes = {SAMPLE: samples, ROW: length, HEAD: part.heads.count}
    kept = [label for label in (SAMPLE, ROW, HEAD) if label in part.labels]
    heads = out.reshape(*(sizes[label] for label in kept), head_dim)
    order = [kept.index(label) for label in part.labels if label in kept]
    return heads.permute(*order, len(kept)).reshape(part.node.meta["val"].shape)
