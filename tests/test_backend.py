"""torch.compile(model, backend="sgl_npu"): what a user's program does around a compiled model still works."""

import pytest
import torch
import torch.nn.functional as F
from backend_cases import INNERS, Attention, assert_same, compiled, count_reports, run_python

import sgl_npu
from sgl_npu.compiler import pipeline

sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


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
