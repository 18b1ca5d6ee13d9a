"""Masks and biases that layers make alike from the same tensors are made once, and so is what kernels want of them.

before: attention(…, mask=unsqueeze(padding, 1)), attention(…, mask=unsqueeze(padding, 1))    two masks
after:  m = unsqueeze(padding, 1); attention(…, mask=m), attention(…, mask=m)                 one
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from sgl_npu.passes.share_nodes import merge_equal, private_to
from sgl_npu.passes.site import AttentionSite


def share_masks(graph: fx.Graph, sites: Sequence[AttentionSite]) -> None:
    """Merge equal nodes that only masks and biases of sites are made of; earlier ones take the users of later ones.

    A tensor that anything else reads stays as it is: two that the caller gets must not become one.
    """
    masks = {x for site in sites for name in ("mask", "bias") if (x := site.argument(name)) is not None}
    if len(masks) < 2:
        return
    readers = {site.node for site in sites}
    graph.eliminate_dead_code()  # what a proof has left unused reads masks too
    merge_equal(graph, private_to(masks, readers.__contains__, lambda x: x.op == "call_function" and x not in readers))
