"""torch.compile(model, backend="sgl_npu"): what a user's program does around a compiled model still works."""

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sgl_npu
from sgl_npu.compiler import pipeline

sdpa = F.scaled_dot_product_attention
INNERS = pytest.mark.parametrize("inner", ["eager", "inductor"])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(function, inner="eager", **arguments):
    return torch.compile(function, backend="sgl_npu", options={"inner": inner}, **arguments)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, check_stride=True)


class Attention(nn.Module):
    """A small causal self-attention with a buffer."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("gain", torch.full((dim,), 1.5))

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)) * self.gain


class count_reports:
    """How many graphs were compiled in its body: `len`, and the reports themselves."""

    def __enter__(self):
        self.start = len(sgl_npu.reports())
        return self

    def __exit__(self, *_):
        self.new = sgl_npu.reports()[self.start :]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---------------------------------------------------------------- how it is asked for


def test_the_backend_is_found_without_importing_the_package():
    code = """
import sys, torch
assert "sgl_npu" not in sys.modules
q = torch.randn(1, 2, 3, 4)
f = torch.compile(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), backend="sgl_npu",
                  options={"inner": "eager"})
f(q)
import sgl_npu
print([site.fused for site in sgl_npu.reports()[-1].sites])
"""
    assert run_python(code) == "[True]"


CONFIGS = """
import torch, torch._inductor.config, torch._functorch.config
from torch._dynamo import config as dynamo
def configs():
    return [dict(c.get_config_copy()) for c in (dynamo, torch._inductor.config, torch._functorch.config)]
before = configs()
"""


def test_importing_changes_no_global_setting():
    code = "import sgl_npu, sgl_npu.compiler.inner_inductor\nprint(configs() == before)"
    assert run_python(CONFIGS + code) == "True"


@INNERS
def test_compiling_and_running_forward_and_backward_changes_no_global_setting(inner):
    scope = {}
    exec(CONFIGS, scope)
    options = {"inner": inner} | ({"inner_options": {"epilogue_fusion": False}} if inner == "inductor" else {})
    model = torch.compile(Attention(), backend="sgl_npu", options=options)
    model(torch.randn(2, 5, 16)).sum().backward()
    assert scope["configs"]() == scope["before"]


WAYS = {
    "nothing": {},
    "a dict": {"options": {"platform": "cpu", "inner": "eager"}},
    "Options": {"options": sgl_npu.Options(inner="eager")},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "default mode": {"mode": "default"},
    "fullgraph": {"fullgraph": True, "options": {"inner": "eager"}},
    "npu on the CPU": {"options": {"platform": "npu"}},
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_for_the_backend_gives_the_answer(way):
    model, x = Attention(), torch.randn(2, 5, 16)
    assert_same(torch.compile(model, backend="sgl_npu", **WAYS[way])(x), model(x))
    assert [site.fused for site in sgl_npu.reports()[-1].sites] == [True]


# ---------------------------------------------------------------- shapes, graphs, recompilation


@torch.no_grad()
@pytest.mark.parametrize("way", ["dynamic=True", "mark_dynamic"])
@pytest.mark.parametrize("platform", ["cpu", "npu"])
def test_one_graph_serves_eight_lengths(way, platform):
    model = Attention()
    options = {"inner": "eager", "platform": platform}
    run = torch.compile(model, backend="sgl_npu", options=options, dynamic=True if way == "dynamic=True" else None)
    with count_reports() as count:
        for length in range(3, 11):
            x = torch.randn(2, length, 16)
            if way == "mark_dynamic":
                torch._dynamo.mark_dynamic(x, 1)
            assert_same(run(x), model(x))
    assert len(count.new) == 1 and count.new[0].fused == 1


@torch.no_grad()
@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (False, 3)])
def test_static_shapes_recompile_and_automatic_ones_turn_dynamic(dynamic, graphs):
    model = Attention()
    run = compiled(model, dynamic=dynamic)
    with count_reports() as count:
        for length in (4, 6, 9):
            x = torch.randn(2, length, 16)
            assert_same(run(x), model(x))
    assert len(count.new) == graphs


@INNERS
def test_dynamic_training_serves_every_length_with_one_graph(inner):
    model = Attention()
    run = compiled(model, inner, dynamic=True)
    with count_reports() as count:
        for length in (4, 6, 9):
            x, y = (torch.ones(2, length, 16, requires_grad=True) for _ in range(2))
            run(x).sin().sum().backward()
            model(y).sin().sum().backward()
            assert_same(x.grad, y.grad)
    assert len(count.new) == 1


def test_a_new_dtype_compiles_again():
    q = torch.randn(2, 4, 5, 8)
    run = compiled(lambda q: sdpa(q, q, q))
    with count_reports() as count:
        for dtype in (torch.float32, torch.float64, torch.float32):
            assert_same(run(q.to(dtype)), sdpa(*[q.to(dtype)] * 3))
    assert [report.sites[0].dtype for report in count.new] == ["float32", "float64"]


def test_every_graph_between_breaks_has_its_report():
    def run(q):
        q = sdpa(q, q, q)
        torch._dynamo.graph_break()
        q = sdpa(q, q, q, is_causal=True)
        torch._dynamo.graph_break()
        return q.sin()

    q = torch.randn(2, 4, 5, 8)
    with count_reports() as count:
        assert_same(compiled(run)(q), run(q))
    assert [[site.mask for site in report.sites] for report in count.new] == [["full"], ["causal"], []]


def test_data_dependent_lengths_are_answered_as_eager_does():
    def run(q, keep):
        kept = q[:, :, keep.nonzero().squeeze(-1)]
        torch._check(kept.size(2) >= 2)
        return sdpa(q, kept, kept)

    q, keep = torch.randn(2, 4, 5, 8), torch.tensor([True, False, True, True, False])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = compiled(run, fullgraph=True)
        assert_same(got(q, keep), run(q, keep))
        assert_same(got(q, ~keep), run(q, ~keep))


@pytest.mark.parametrize("reset", [torch._dynamo.reset, torch.compiler.reset])
def test_a_reset_compiles_again(reset):
    model, x = Attention(), torch.randn(2, 5, 16)
    with count_reports() as count:
        for _ in range(2):
            assert_same(compiled(model)(x), model(x))
            reset()
    assert len(count.new) == 2


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


# ---------------------------------------------------------------- failures


class Broken(Exception):
    pass


def break_graph(gm, context):
    """A pass that fails after it has made the graph wrong."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
        node.target = torch.ops.aten.cos.default
    raise Broken("halfway")


@pytest.fixture(params=[0, None], ids=["first", "last"])
def broken_pass(request, monkeypatch):
    step = (pipeline.Pass("broken", break_graph),)
    order = step + pipeline.PASSES if request.param == 0 else pipeline.PASSES + step
    monkeypatch.setattr(pipeline, "PASSES", order)


@pytest.mark.parametrize("train", [False, True])
def test_a_pass_that_fails_halfway_is_undone_and_named(broken_pass, train):
    q = torch.randn(2, 4, 5, 8, requires_grad=train)
    run = compiled(lambda q: sdpa(q.sin(), q, q))
    with pytest.warns(UserWarning, match="'broken' failed.*halfway"):
        got = run(q)
    assert_same(got, sdpa(q.sin(), q, q))
    assert sgl_npu.reports()[-1].fused == 1


def test_where_the_selection_fails_attention_is_decomposed(monkeypatch):
    order = [pipeline.Pass("select", break_graph) if step.name == "select" else step for step in pipeline.PASSES]
    monkeypatch.setattr(pipeline, "PASSES", tuple(order))
    q = torch.randn(2, 4, 5, 8)
    with pytest.warns(UserWarning, match="'select' failed.*halfway"):
        assert_same(compiled(lambda q: sdpa(q, q, q))(q), sdpa(q, q, q))
    report = sgl_npu.reports()[-1]
    assert report.sites[0].op == "aten (decomposed)" and "sgl_npu.attention" not in report.graph


def test_strict_raises_what_the_pass_raised(broken_pass):
    run = torch.compile(torch.sin, backend="sgl_npu", options={"inner": "eager", "strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Broken: halfway"):
        run(torch.randn(3))


def test_a_capture_that_fails_leaves_the_call_to_torch(monkeypatch):
    from sgl_npu.passes import capture_sdpa

    def fail(*_):
        raise Broken("halfway")

    monkeypatch.setattr(capture_sdpa, "_match_heads", fail)
    q = torch.randn(2, 4, 5, 8)
    with pytest.warns(UserWarning, match="capture failed: halfway"):
        assert_same(compiled(lambda q: sdpa(q, q, q))(q), sdpa(q, q, q))
    assert sgl_npu.reports()[-1].sites[0].refusals == [("capture", "capture failed: halfway")]
    strict = torch.compile(lambda q: sdpa(q, q, q), backend="sgl_npu", options={"inner": "eager", "strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Broken: halfway"):
        strict(q)


def test_the_users_own_exceptions_pass_through():
    def run(q):
        out = sdpa(q, q, q)
        torch._dynamo.graph_break()
        raise Broken(f"from the model: {tuple(out.shape)}")

    with pytest.raises(Broken, match="from the model"):
        compiled(run)(torch.randn(2, 4, 5, 8))
