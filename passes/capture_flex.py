"""`torch.nn.attention.flex_attention` as the canonical op, where no compiler behind ours has a kernel for it.

before: flex_attention(q, k, v, score_mod, block_mask, scale, ...)                                    a higher-order op
after:  sgl_npu::attention(q, k, v, mask_mod at every (b, h, i, j), what score_mod adds, softcap=...)           on NPU

Eager torch, and so every compiler that has no kernel for it, reads the mask off mask_mod and never looks at the lists
of blocks that stand beside it (`math_attention` in torch/_higher_order_ops/flex_attention.py, 2.13); so do we. Inductor
goes by the lists and has a kernel, so on CPU and CUDA the call is left to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention.flex_attention import create_mask

from sgl_npu.passes.capture_order import in_order, visible_order
from sgl_npu.passes.capture_record import Capture, attempt, other_device
from sgl_npu.passes.capture_sdpa import autocast
from sgl_npu.passes.flex_scores import read_score_mod
from sgl_npu.passes.site import Refusal, mark_site
from sgl_npu.runtime.attention import attention, compute_dtype
from sgl_npu.runtime.sizes import guard

FLEX_SPELLING = "flex_attention"
_WHOLE = 1 << 30  # the block size of the BlockMask that torch makes where a call has none
_MAX_SCORES = 2  # of (out, lse, max_scores)
Part = tuple[fx.GraphModule, Sequence[Any]]  # a function of (b, h, i, j, *buffers), and the buffers


def capture_flex(node: fx.Node, capture: Capture) -> None:
    record = capture.new_record(node, FLEX_SPELLING)
    mark_site(node, record)
    if capture.platform != "npu":
        record.op, record.fused = FLEX_SPELLING, True
        return
    node.target = canonical_flex
    wants_max = any(user.args[1] == _MAX_SCORES and user.users for user in node.users)
    out = next((user for user in node.users if user.args[1] == 0), None)
    order = None if out is None else visible_order(out)
    node.kwargs = {**node.kwargs, "wants_max": wants_max, "order": order, "site": record.id}


def canonical_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: fx.GraphModule,
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: Sequence[Any] = (),
    mask_mod_other_buffers: Sequence[Any] = (),
    *,
    wants_max: bool,
    order: tuple[int, ...] | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The op through the canonical one; the original where a rule refuses. Returns out, lse / ln 2 and no maxima.

    `order` is the dimension order, slowest first, of torch's own result, where somebody could tell the difference.
    """
    mask_mod, blocks = block_mask[-1], block_mask[-3:-1]

    def rewritten() -> tuple[Tensor, Tensor, None] | Refusal:
        read = read_score_mod(score_mod)
        if isinstance(read, Refusal):
            return read
        kept = [] if _keeps_all(mask_mod) else [(mask_mod, mask_mod_other_buffers)]
        kept += [(part, score_mod_other_buffers) for part in read.kept]
        added = [(is_negative, (part, score_mod_other_buffers)) for is_negative, part in read.added]
        return _captured_flex(query, key, value, kept, added, scale * read.factor, read.softcap, order)

    found = attempt(site, _refuse(query, scale, mask_mod, blocks, wants_max), rewritten)
    if found is not None:
        return found
    return torch.ops.higher_order.flex_attention(
        query, key, value, score_mod, block_mask, scale, kernel_options,
        score_mod_other_buffers, mask_mod_other_buffers,
    )  # fmt: skip


def _captured_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Part],
    added: Sequence[tuple[bool, Part]],
    scale: float,
    softcap: float,
    order: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor, None] | Refusal:
    query, key, value = autocast(query, key, value)
    key, value = (x if guard(x.size(0) == query.size(0)) else x.expand(query.size(0), -1, -1, -1) for x in (key, value))
    mask: Tensor | None = None
    for part in kept:
        condition = _at_every_score(part, query, key)
        mask = condition if mask is None else mask & condition
    terms = [(is_negative, _at_every_score(part, query, key)) for is_negative, part in added]
    dtype = compute_dtype(query.dtype)
    if any(term.dtype == torch.float64 != dtype for _, term in terms):
        return Refusal("score_mod: what is added is float64, and makes scores and lse float64")
    bias: Tensor | None = None
    for is_negative, term in terms:
        # As it is where a kernel may want it in the query's dtype; several are added up as the scores are.
        term = term if term.dtype == query.dtype and len(terms) == 1 else term.to(dtype)
        term = -term if is_negative else term
        bias = term if bias is None else bias + term
    out, lse = attention(query, key, value, mask, bias, scale=scale, softcap=softcap)
    return out if order is None else in_order(out, order), lse / math.log(2), None


def _refuse(query: Tensor, scale: Any, mask_mod: fx.GraphModule, blocks: Any, wants_max: bool) -> str | None:
    """The first rule under which torch keeps the call, whatever its score_mod does, or None."""
    if wants_max:
        return "the largest scores are used: the canonical op returns none"
    if not isinstance(scale, (int, float)):
        return "the scale is known at run time only"
    if _keeps_all(mask_mod) and tuple(blocks) != (_WHOLE, _WHOLE):
        return "mask_mod keeps every score: only the BlockMask's lists could mask, and eager torch does not read them"
    return other_device(query)


def _keeps_all(mask_mod: fx.GraphModule) -> bool:
    """Whether it is torch's own `noop_mask`."""
    (result,) = mask_mod.graph.output_node().args
    result = result[0] if isinstance(result, (tuple, list)) else result
    return isinstance(result, fx.Node) and result.op == "call_method" and result.target == "new_ones"


def _at_every_score(part: Part, query: Tensor, key: Tensor) -> Tensor:
    """What a function of (b, h, i, j) gives, (B or 1, Hq or 1, Sq or 1, Skv or 1)."""
    function, buffers = part

    def at(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return function(b, h, i, j, *buffers)

    batch, heads, rows = query.shape[:3]
    with torch.autocast(query.device.type, enabled=False):  # as around torch's own call of them
        found = create_mask(at, batch, heads, rows, key.size(2), query.device)
    for dim, stride in enumerate(found.stride()):
        if isinstance(stride, int) and stride == 0 and guard(found.size(dim) > 1):  # the same for every b, ...
            found = found.narrow(dim, 0, 1)
    return found
