"""A compiled model gives what eager gives: aliases, strides, caches, modes of running, threads, copies."""

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from backend_cases import INNERS, Attention, assert_same, compiled, count_reports
from torch import nn

sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


# ---------------------------------------------------------------- inputs and outputs


class Cache(nn.Module):
    """One decode step over a static cache that the graph itself updates."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.register_buffer("keys", torch.zeros(2, 2, 8, 4))
        self.register_buffer("values", torch.zeros(2, 2, 8, 4))

    def forward(self, q, k, v, position):
        if self.way == "index_copy_":
            self.keys.index_copy_(2, position, k)
            self.values.index_copy_(2, position, v)
        else:
            self.keys[:, :, position] = k
            self.values[:, :, position] = v
        mask = torch.arange(8) <= position.unsqueeze(-1)
        return sdpa(q, self.keys, self.values, mask, enable_gqa=True)


@torch.no_grad()
@INNERS
@pytest.mark.parametrize("way", ["index_copy_", "slice"])
def test_a_static_cache_is_updated_inside_the_graph(inner, way):
    model, reference = Cache(way), Cache(way)
    run = compiled(model, inner, fullgraph=True)
    with count_reports() as count:
        for step in range(5):
            q, k, v = torch.randn(2, 4, 1, 4), torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4)
            assert_same(run(q, k, v, torch.tensor([step])), reference(q, k, v, torch.tensor([step])))
            assert_same(model.keys, reference.keys)
    assert len(count.new) == 1


def shares(outputs, x):
    storage = [y.untyped_storage().data_ptr() for y in outputs if isinstance(y, torch.Tensor)]
    return [[a == b for b in storage] for a in storage], [a == x.untyped_storage().data_ptr() for a in storage]


ALIASES = {
    "a view of an input": lambda x: (x.transpose(0, 1), sdpa(x, x, x)),
    "the input itself": lambda x: (x, sdpa(x, x, x)),
    "two views of one result": lambda x: (y := sdpa(x, x, x), y.view(-1)),
    "one result twice": lambda x: (y := sdpa(x, x, x), y),
    "a mutated input": lambda x: (x.add_(1), sdpa(x, x, x)),
    "an input view mutated": lambda x: (x[0].mul_(2), sdpa(x, x, x)),
    "a result and its slice changed": lambda x: (y := sdpa(x, x, x).sin(), y[0].add_(1)),
    "numbers and nothing": lambda x: (sdpa(x, x, x), 3, None, x.size(1)),
    "an expanded result": lambda x: (sdpa(x, x, x)[:1].expand(2, 4, 5, 8), x.mT),
}


@INNERS
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("case", ALIASES)
def test_outputs_alias_as_in_eager(case, inner, train):
    function = ALIASES[case]
    x, y = torch.randn(2, 4, 5, 8), None
    y = x.clone()
    if train:
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        x, y = (leaf * 1 for leaf in leaves)
    expected, got = function(y), compiled(function, inner)(x)
    assert_same(got, expected)
    assert_same(x, y)
    assert shares(got, x) == shares(expected, y)
    assert [z is x for z in got] == [z is y for z in expected]
    if train:
        got[-1 if isinstance(got[-1], torch.Tensor) else 0].sin().sum().backward()
        expected[-1 if isinstance(expected[-1], torch.Tensor) else 0].sin().sum().backward()
        assert_same(leaves[0].grad, leaves[1].grad)


def test_an_input_that_is_a_view_is_read_where_it_lies():
    base = torch.randn(4, 2, 9, 8)
    run = compiled(lambda q: sdpa(q, q, q, is_causal=True))
    for view in (
        base.transpose(0, 1)[:, :, 2:7],
        base.transpose(0, 1)[:, :, 3:8],
        base[::2, :, 1:6].expand(2, 2, 5, 8),
    ):
        assert_same(run(view), sdpa(view, view, view, is_causal=True))


OTHERS = {
    "no tensor": ((), lambda: torch.ones(3).cumsum(0)),
    "no attention": ((torch.randn(3),), lambda x: x.sin()),
    "an unused input": ((torch.randn(3), torch.randn(2)), lambda x, y: x.sin()),
    "complex tensors": ((torch.randn(3, dtype=torch.complex64),), lambda x: (x * x).abs()),
    "integers": ((torch.arange(5), 3), lambda x, n: (x * n, x.sum() > n)),
    "an empty batch": ((torch.randn(0, 4, 5, 8),), lambda q: sdpa(q, q, q).sum(0)),
    "a Python number": ((torch.randn(2, 4, 5, 8), 0.7), lambda q, s: sdpa(q * s, q, q)),
    "nothing to compute": ((torch.randn(3),), lambda x: x),
}


@INNERS
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("case", OTHERS)
def test_any_graph_gives_the_answer_of_eager(case, inner, dynamic):
    arguments, function = OTHERS[case]
    if inner == "inductor" and case == "complex tensors":
        warnings.simplefilter("ignore")
    with count_reports() as count:
        assert_same(compiled(function, inner, dynamic=dynamic)(*arguments), function(*arguments))
    assert sum(len(report.sites) for report in count.new) == (case in ("an empty batch", "a Python number"))


@INNERS
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=["BNSD", "BSND", "SBND"])
def test_outputs_have_the_strides_of_eager(inner, order):
    q = torch.randn(5, 5, 5, 8).permute(order)
    function = lambda q: (sdpa(q, q, q), sdpa(q, q, q, torch.ones(5, 5)) + 1, sdpa(q, q, q).mT)  # noqa: E731
    assert_same(compiled(function, inner)(q), function(q))


CATS = {
    "nothing and keys": lambda k: [torch.empty(0), k],
    "no rows and keys": lambda k: [k[:, :, :0], k],
    "keys alone": lambda k: [k],
    "channels last": lambda k: [k.contiguous(memory_format=torch.channels_last)],
    "channels last and nothing": lambda k: [torch.empty(0), k.contiguous(memory_format=torch.channels_last)],
}


@INNERS
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("case", CATS)
def test_a_cache_that_a_prompt_starts_has_the_strides_of_eager(inner, dynamic, case):
    function = lambda x: torch.cat(CATS[case]((x * 2).transpose(1, 2)), -2)  # noqa: E731
    x = torch.randn(2, 7, 4, 8)
    assert_same(compiled(function, inner, dynamic=dynamic)(x), function(x))


# ---------------------------------------------------------------- modes of running


@INNERS
def test_inference_mode_and_autocast_around_the_model(inner):
    model, x = Attention(), torch.randn(2, 5, 16)
    run = compiled(model, inner)
    with torch.inference_mode():
        assert_same(run(x), model(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(x), model(x), atol=2e-2, rtol=2e-2)
    assert_same(run(x), model(x))


@INNERS
def test_training_after_inference_gives_the_gradients_of_eager(inner):
    model, x = Attention(), torch.randn(2, 5, 16)
    run = compiled(model, inner)
    with torch.no_grad():
        assert_same(run(x), model(x))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).sin().sum(), parameters)
    assert_same(torch.autograd.grad(run(x).sin().sum(), parameters), expected)


@pytest.mark.parametrize("train", [False, True])
def test_threads_compile_and_run_different_functions_side_by_side(train):
    functions = [
        lambda q: sdpa(q, q, q),
        lambda q: sdpa(q, q, q, is_causal=True),
        lambda q: sdpa(q, q, q, q @ q.mT),
        lambda q: sdpa(q, q, q, q @ q.mT > 0),
    ]
    q = torch.randn(2, 4, 5, 8)
    results, start = {}, threading.Barrier(4)

    def outcome(function):
        x = q.clone().requires_grad_(train)
        out = function(x)
        return (out, *torch.autograd.grad(out.sin().sum(), x)) if train else (out,)

    def work(n):
        start.wait()
        run = compiled(functions[n])
        results[n] = [outcome(run) for _ in range(3)]

    with count_reports() as count:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for n, function in enumerate(functions):
        for got in results[n]:
            assert_same(got[0], outcome(function)[0])
            torch.testing.assert_close(got, outcome(function), atol=1e-5, rtol=1e-5)
    assert sorted(report.sites[0].mask for report in count.new) == ["causal", "full", "full + bias", "tensor"]


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_of_the_model_works_before_and_after_compilation(duplicate, when):
    model, x = Attention(), torch.randn(2, 5, 16)
    if when == "before":
        assert_same(compiled(duplicate(model))(x), model(x))
    run = compiled(model)
    run(x)
    assert_same(duplicate(run)(x), model(x))
    assert_same(duplicate(model)(x), model(x))
