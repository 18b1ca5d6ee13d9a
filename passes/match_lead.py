"""Which of the dimensions before rows and keys are the batch and which are the heads, and tensors brought to that."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, fx

from sgl_npu.passes.axes import axes_of, in_order, places, through, view_chain
from sgl_npu.passes.fx_ops import aten
from sgl_npu.passes.match_fold import Lead
from sgl_npu.passes.match_operands import is_broadcast
from sgl_npu.runtime.sizes import Size, known


def choose_lead(levels: Sequence[Sequence[Size]], operands: Sequence[fx.Node]) -> Lead:
    """(B, H): the two dimensions that the scores have on the way, else those that an operand has further up.

    `levels` are the shapes of scores and probabilities, the softmax's own first. Where all of them have three
    dimensions or more before the rows, the last is the heads.
    """
    leads = [tuple(level[:-2]) for level in levels]
    for lead in leads:
        if len(lead) == 2:
            return lead[0], lead[1]
    lead = leads[0]
    if len(lead) == 0:
        return 1, 1
    if len(lead) == 1:
        found = (_before_merging(operand) for operand in operands)
        return next((pair for pair in found if pair is not None), (lead[0], 1))
    return math.prod(lead[:-1]), lead[-1]


def _before_merging(operand: fx.Node) -> Lead | None:
    """The batch and the heads of a tensor of four dimensions of which (B * H, S, D) is a view."""
    chain = view_chain(operand)
    for depth, source in enumerate(chain):
        if source.meta["val"].dim() != 4:
            continue
        axes = through(axes_of(source), chain[: depth + 1])
        if axes is None or len(axes) != 3 or any(len(atom.place) > 1 for dim in axes for atom in dim):
            continue
        lead = axes[0]
        if len(lead) == 2:
            return lead[0].size, lead[1].size
        if len(lead) == 1:
            return (lead[0].size, 1) if lead[0].place == (0,) else (1, lead[0].size)
    return None


def unrepeated(
    operands: Sequence[fx.Node], batches: Sequence[Sequence[Size]], heads: Sequence[Size]
) -> tuple[tuple[fx.Node, ...], Lead, Lead] | None:
    """Key and value before their heads are repeated, by the product or before it; (B, H) of the query and (B, Hkv).

    (B, Hkv, 1, S, D) is widened to (B, Hkv, G, S, D), (B, 1, S, D) to (B, H, S, D), (S, D) to anything. `batches` are
    the leading dimensions of the two products, `heads` those of the scores.
    """
    found = [_narrow(operand, batch) for operand, batch in zip(operands, batches, strict=True)]
    nodes = tuple(node for node in found if node is not None)
    ranks = {node.meta["val"].dim() for node in nodes}
    if len(nodes) < len(found) or ranks not in ({2}, {len(heads) + 2}):
        return None
    if ranks == {2}:
        return nodes, (1, math.prod(heads)), (1, 1)
    batch, kv_heads = nodes[0].meta["val"].shape[:2]
    return nodes, (batch, math.prod(heads[1:])), (batch, kv_heads)


def _narrow(operand: fx.Node, batch: Sequence[Size]) -> fx.Node | None:
    """The tensor that an operand repeats, if the heads, the third dimension from behind, are all that it repeats."""
    shape = operand.meta["val"].shape
    if is_broadcast(operand, batch):
        return operand if len(shape) == 2 or _repeats_heads(operand, (*batch, *shape[-2:])) else None
    chain = view_chain(operand)
    source = chain[-1]
    if source.target is not aten.expand.default or not _repeats_heads(source.args[0], source.meta["val"].shape):
        return None
    axes = axes_of(source)
    found = through(axes, chain)
    whole = found is not None and in_order(found) and places(found[-2:]) == places(axes[-2:])
    return source.args[0] if whole else None


def _repeats_heads(node: fx.Node, wide: Sequence[Size]) -> bool:
    before = node.meta["val"].shape
    if len(wide) not in (4, 5) or len(before) != len(wide) or not known(before[-3] == 1):
        return False
    return all(known(a == b) for n, (a, b) in enumerate(zip(before, wide, strict=True)) if n != len(wide) - 3)


def in_four_dims(x: Tensor, level: Sequence[Size], lead: Lead) -> Tensor:
    """A tensor that broadcasts to scores of the shape `level` as one that does to (*lead, rows, keys)."""
    before = tuple(level[:-2])
    if x.dim() <= 2 or (len(before) == 2 and all(known(a == b) for a, b in zip(before, lead, strict=True))):
        return x
    x = x.reshape((1,) * (len(level) - x.dim()) + tuple(x.shape))
    wide, narrow = list(x.shape[:-2]), []
    for dims, sizes in _groups(before, lead):
        if all(known(x.size(dim) == 1) for dim in dims):
            narrow += [1] * len(sizes)
        else:
            wide[dims.start : dims.stop] = before[dims.start : dims.stop]
            narrow += sizes
    return x.expand(*wide, *x.shape[-2:]).reshape(*narrow, *x.shape[-2:])


def _groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[range, list[Size]]]:
    """The smallest runs of dimensions that hold as many entries before as after."""
    groups, start, left = [], 0, list(after)
    while start < len(before) or left:
        stop, taken = start, []
        have: Size = 1
        want: Size = 1
        while True:
            if stop < len(before) and (not left or _at_most(have, want)):
                have, stop = have * before[stop], stop + 1
            elif left:
                want = want * left[0]
                taken.append(left.pop(0))
            if (known(have == want) and stop > start) or (stop == len(before) and not left):
                break
        groups.append((range(start, stop), taken))
        start = stop
    return groups


def _at_most(have: Size, want: Size) -> bool:
    return known(have == want) or known(have < want)
