"""Sizes that a rewrite uses and the graph has no node for: computed from the sizes of the graph's inputs."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from sgl_npu.passes.inline import trace_before

SIZES = {
    "three factors": lambda h, w: h * w * h,
    "a power": lambda h, w: h * h * w * w,
    "rounded up": lambda h, w: math.ceil(h / 2) * math.ceil(w / 2),
    "rounded up twice": lambda h, w: math.ceil(((h - 1) // 8 + 1) / 2) ** 2 * w,
    "rounded down": lambda h, w: math.floor(h / 3) + w,
    "cut": lambda h, w: math.trunc(h / 3) * w,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_computed_from_those_of_the_inputs(name):
    size = SIZES[name]
    gm = make_fx(lambda x: x.sum(), tracing_mode="symbolic")(torch.randn(12, 20))
    (given,) = gm.graph.find_nodes(op="placeholder")
    (output,) = gm.graph.find_nodes(op="output")
    total = output.args[0]
    wanted = size(*given.meta["val"].shape)

    def run(x):
        with disable_proxy_modes_tracing():
            length = wanted + 0
        return (x.new_ones(length),)

    (made,) = trace_before(gm, total, run, [given], {}, {})
    output.args = (made,)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    for height, width in ((12, 20), (17, 5), (33, 8), (3, 3)):
        assert gm(torch.randn(height, width)).shape == (size(height, width),)
