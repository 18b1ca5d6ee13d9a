"""Ops put in the place of a node: shared with earlier sites, never with later ones."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.passes.inline import trace_before


@pytest.mark.parametrize("order, aranges", [((0, 1), 1), ((1, 0), 2)], ids=["in graph order", "against it"])
def test_an_op_is_shared_only_with_what_comes_after_it(order, aranges):
    gm = make_fx(lambda x: (x.sin(), x.cos()), tracing_mode="fake")(torch.ones(4))
    (x,) = gm.graph.find_nodes(op="placeholder")
    anchors, seen = [node for node in gm.graph.nodes if node.op == "call_function"], {}
    for number in order:
        (new,) = trace_before(gm, anchors[number], lambda x: (x + torch.arange(4),), [x], {}, seen)
        anchors[number].replace_all_uses_with(new)
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.arange.default)) == aranges
    torch.testing.assert_close(gm(torch.ones(4)), (torch.ones(4) + torch.arange(4),) * 2)
