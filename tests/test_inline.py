"""Ops put in the place of a node: shared with earlier sites, never with later ones."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.passes.inline import trace_before

sdpa = torch.nn.functional.scaled_dot_product_attention


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


@pytest.mark.parametrize("pairs", [((0, 0), (1, 2), (2, 1)), ((1, 2), (0, 0))], ids=["first alike", "last alike"])
def test_an_input_that_is_given_twice_is_another_pattern_for_what_is_traced_once(pairs):
    values = [torch.full((4,), float(number)) for number in (2, 3, 5)]
    gm = make_fx(lambda x, y, z: (x.sin(), y.cos(), z.tan()), tracing_mode="fake")(*values)
    inputs, seen = gm.graph.find_nodes(op="placeholder"), {}
    anchors = [node for node in gm.graph.nodes if node.op == "call_function"]
    for anchor, pair in zip(anchors, pairs, strict=False):
        (new,) = trace_before(gm, anchor, lambda x, y: (x - 2 * y,), [inputs[at] for at in pair], {}, seen, "same")
        anchor.replace_all_uses_with(new)
    gm.recompile()
    for found, (one, other) in zip(gm(*values), pairs, strict=False):
        torch.testing.assert_close(found, values[one] - 2 * values[other])


@pytest.mark.parametrize("platform", ["cpu", "npu"])
def test_an_attention_to_what_an_attention_to_itself_has_given_is_another(platform):
    def attend(x):
        return sdpa(sdpa(x, x, x), x, x)

    x = torch.randn(1, 2, 12, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(attend, backend="sgl_npu", options={"platform": platform, "strict": True})(x)
    torch.testing.assert_close(found, attend(x))
