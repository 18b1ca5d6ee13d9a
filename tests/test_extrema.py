"""The larger of two sizes is one of them, with a guard."""

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from sgl_npu.passes.extrema import choose_extrema

SIZES = {"height": 48, "width": 80, "depth": 80}


def graph_of(build):
    """The graph of `build(height, width, depth, data)`: symbols with a value, and one without."""
    env, graph = ShapeEnv(), fx.Graph()
    inputs = []
    for name, size in SIZES.items():
        node = graph.placeholder(name)
        symbol = env.create_symbol(size, ConstantSource(name), DimDynamic.DYNAMIC)
        node.meta["val"] = env.create_symintnode(symbol, hint=size)
        inputs.append(node)
    inputs.append(graph.placeholder("data"))
    inputs[-1].meta["val"] = env.create_unbacked_symint()

    def call(target, *args):
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda x: x.meta["val"]))
        return node

    graph.output(build(call, *inputs))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    choose_extrema(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, env


def extrema(gm):
    return [node for node in gm.graph.nodes if node.target in (torch.sym_max, torch.sym_min)]


def test_the_larger_of_two_is_the_input_that_it_is():
    gm, env = graph_of(lambda call, height, width, *_: call(operator.mul, call(torch.sym_max, height, width), 2))
    assert_expected_inline(
        gm.code.strip(),
        """\
def forward(self, height, width, depth, data):
    mul = width * 2;  width = None
    return mul""",
    )
    assert len(env.guards) == 1


CASES = {
    "max": lambda call, h, w, d, u: call(torch.sym_max, h, w),
    "max, the other way": lambda call, h, w, d, u: call(torch.sym_max, w, h),
    "min": lambda call, h, w, d, u: call(torch.sym_min, h, w),
    "min, the other way": lambda call, h, w, d, u: call(torch.sym_min, w, h),
    "of equals": lambda call, h, w, d, u: call(torch.sym_max, w, d),
    "of one size": lambda call, h, w, d, u: call(torch.sym_min, h, h),
    "a small number": lambda call, h, w, d, u: call(torch.sym_max, 1, h),
    "a large number": lambda call, h, w, d, u: call(torch.sym_max, h, 100),
    "cut off": lambda call, h, w, d, u: call(torch.sym_min, h, 32),
    "of two numbers": lambda call, h, w, d, u: call(torch.sym_min, 3, 5),
    "max of max": lambda call, h, w, d, u: call(torch.sym_max, call(torch.sym_max, h, w), d),
    "max of min": lambda call, h, w, d, u: call(torch.sym_max, call(torch.sym_min, w, d), h),
    "min of max": lambda call, h, w, d, u: call(torch.sym_min, call(torch.sym_max, h, 64), w),
    "of what is computed": lambda call, h, w, d, u: call(torch.sym_max, call(operator.mul, h, 2), w),
    "computed with": lambda call, h, w, d, u: call(operator.sub, call(torch.sym_max, h, w), call(torch.sym_min, h, w)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_chosen_operand_is_the_value(case):
    gm, _ = graph_of(CASES[case])
    assert not extrema(gm)
    values = list(SIZES.values())
    plain = {torch.sym_max: max, torch.sym_min: min}
    expected = CASES[case](lambda target, *args: plain.get(target, target)(*args), *values, None)
    assert gm(*values, None) == expected


def test_a_size_without_a_value_is_not_decided():
    gm, env = graph_of(lambda call, h, w, d, data: call(torch.sym_max, data, h))
    assert len(extrema(gm)) == 1 and not env.guards
    assert gm(*SIZES.values(), 7) == 48 and gm(*SIZES.values(), 70) == 70


def test_a_size_without_a_value_that_is_surely_the_smaller_is():
    def build(call, h, w, d, data):
        torch._check(data.meta["val"] <= 4)
        torch._check(data.meta["val"] >= 0)
        return call(torch.sym_max, 5, data)

    gm, _ = graph_of(build)
    assert not extrema(gm) and gm(*SIZES.values(), 3) == 5
