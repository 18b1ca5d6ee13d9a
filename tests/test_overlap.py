"""Operands in the same memory: copied where an in-place form could be written over them, and nowhere else."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.reinplace import reinplace

from sgl_npu.compiler.graph_text import graph_text
from sgl_npu.passes.overlap import separate_operands

aten = torch.ops.aten


def traced(function, *inputs, mode="fake"):
    gm = make_fx(function, tracing_mode=mode)(*inputs)
    separate_operands(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def copies(gm):
    return len(gm.graph.find_nodes(op="call_function", target=aten.clone.default))


def differences(x):
    y = x.cumsum(0)
    return y[1:] - y[:-1]


def test_the_first_of_two_views_of_the_same_memory_is_copied():
    assert_expected_inline(
        graph_text(traced(differences, torch.randn(7))),
        """\
input: f32[7]
cumsum: f32[7] = aten.cumsum(input, 0)
slice: f32[6] = aten.slice.Tensor(cumsum, 0, 1, 9223372036854775807)
slice1: f32[6] = aten.slice.Tensor(cumsum, 0, 0, -1)
clone: f32[6] = aten.clone(slice)
sub: f32[6] = aten.sub.Tensor(clone, slice1)
return sub""",
    )


SHARED = {
    "two slices": differences,
    "a tensor and its transpose": lambda x: (lambda y: y - y.t())(x * 3),
    "a transpose and its tensor": lambda x: (lambda y: y.t() - y)(x * 3),
    "views of views": lambda x: (lambda y: y.t().view(-1)[1:] - y.t().reshape(-1)[:-1])((x * 3).t()),
    "a view that its schema does not call one": lambda x: (
        lambda y: aten._unsafe_view(y, [-1])[1:] - aten._unsafe_view(y, [-1])[:-1]
    )(x * 3),
    "parts of one split": lambda x: (lambda y: torch.add(*y.split(3)) * 2)(x * 3),
    "parts of an unsafe split": lambda x: (lambda y: torch.sub(*aten.unsafe_split(y, 3)))(x * 3),
    "the third operand": lambda x: (lambda y: torch.addcmul(y, x, y.t()))(x * 3),
    "an operand by its name": lambda x: (lambda y: torch.ops.aten.add.Tensor(y, other=y.t()))(x * 3),
    "an index": lambda x: (lambda y: aten.index_put(y, [y.t()[0]], y))((x * 0).long()),
    "what is scattered": lambda x: (lambda y: y.slice_scatter(y[:-1], 0, 1))(x * 3),
    "what is scattered into a diagonal": lambda x: (lambda y: y.diagonal_scatter(y[0]))(x * 3),
    "a product with itself": lambda x: (lambda y: torch.addmm(y, y, y))(x * 3),
    "a copy": lambda x: (lambda y: aten.copy(y[1:], y[:-1]))(x * 3),
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("case", SHARED)
def test_a_reinplaced_graph_gives_the_numbers_of_eager(case, mode):
    x = torch.randn(6, 6)
    gm = traced(SHARED[case], x, mode=mode)
    assert copies(gm) >= 1
    reinplace(gm, x)
    assert torch.equal(gm(x), SHARED[case](x))


def test_without_the_copy_torch_itself_writes_over_an_operand():
    """Why the pass is there. If torch learns to see it, the first line fails and the pass has one reason less."""
    x = torch.randn(6, 6)
    gm = make_fx(SHARED["a transpose and its tensor"])(x)
    reinplace(gm, x)
    assert gm.graph.find_nodes(op="call_function", target=aten.sub_.Tensor)


JOINED = {
    "a part of the whole and an operand": lambda x: (lambda y: torch.cat([y, x * 2])[1:7] - y)(x * 3),
    "an operand and a part of the whole": lambda x: (lambda y: y - torch.cat([y, x * 2])[1:7])(x * 3),
    "through another cat": lambda x: (lambda y: torch.cat([torch.cat([y, x * 2]), x * 4])[1:7] - y)(x * 3),
}


@pytest.mark.parametrize("case", JOINED)
def test_the_operands_of_a_cat_lie_in_its_result(case):
    x = torch.randn(6, 6)
    gm = traced(JOINED[case], x)
    assert copies(gm) == 1
    assert torch.equal(gm(x), JOINED[case](x))


APART = {
    "a cat along another dimension": lambda x: (lambda y: torch.cat([y, x * 2], 1)[:, 1:7] - y)(x * 3),
    "graph inputs": lambda x: x[1:] - x[:-1],
    "results of different ops": lambda x: (x * 2) - (x * 3).t(),
    "a copy in between": lambda x: (lambda y: y - y.t().abs())(x * 2),
    "one node twice in an elementwise op": lambda x: (lambda y: y * y)(x * 2),
    "another dtype": lambda x: (lambda y: y == y.t())(x * 2),
    "a larger result": lambda x: (lambda y: y[:, None] - y[None, :])(x * 2),
    "no in-place form": lambda x: (lambda y: torch.cat([y, y.t()]))(x * 2),
    "a product, which has none": lambda x: (lambda y: y @ y.t())(x * 2),
    "two results of one op": lambda x: (lambda y: y.values * y.indices)((x * 2).max(0)),
    "only views": lambda x: (lambda y: y.t().unsqueeze(0).expand(3, -1, -1))(x * 2),
    "a number": lambda x: (x * 2) - 1,
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("case", APART)
def test_nothing_is_copied_without_need(case, mode):
    x = torch.randn(6, 6)
    gm = traced(APART[case], x, mode=mode)
    assert copies(gm) == 0
    assert torch.equal(gm(x), APART[case](x))


def test_an_input_that_the_graph_changes_is_told_apart_from_its_views():
    def changed(x):
        x.copy_(torch.sub(x, x.t()))
        return x + 1

    gm = traced(changed, torch.randn(6, 6))
    assert_expected_inline(
        graph_text(gm),
        """\
input: f32[6, 6]
t: f32[6, 6] = aten.t(input)
clone: f32[6, 6] = aten.clone(input)
sub: f32[6, 6] = aten.sub.Tensor(clone, t)
copy_: f32[6, 6] = aten.copy_(input, sub)
add: f32[6, 6] = aten.add.Tensor(copy_, 1)
return add""",
    )


def test_a_node_without_a_known_value_is_told_apart_too():
    gm = make_fx(differences, tracing_mode="fake")(torch.randn(7))
    for node in gm.graph.nodes:
        node.meta.clear()
    separate_operands(gm.graph)
    assert copies(gm) == 1
