"""backend="sgl_npu" on NPU tensors hands over to npugraph_ex: the right numbers, few graphs, clear errors."""

import hand_over_cases as cases
import pytest
import torch
from hand_over_cases import BF16, CASES, FP32, HEADS, MERGES, PACKED, WIDTH, Block, check, compiled, differences, rand
from torch import fx

import sgl_npu
from sgl_npu.compiler import inner_ascend
from sgl_npu.compiler.inner_ascend import refuse_canonical_nodes

# Everything but the capture.
EAGER = {"inner_options": {"force_eager": True}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def handed_over(monkeypatch):
    """Every graph as the compiler gets it."""
    return cases.recorded(inner_ascend.NpugraphEx, monkeypatch)


@pytest.mark.parametrize("case", [*CASES, *MERGES])
def test_every_call_gives_what_eager_gives(case):
    function, calls = {**CASES, **MERGES}[case]
    check(function, calls, EAGER)


def test_npugraph_ex_is_what_npu_tensors_get():
    (report,) = check(cases.causal, [(rand(2, 24, WIDTH),)], EAGER)
    assert (report.platform, report.inner, report.fused) == ("npu", "npugraph_ex", 1)


# ---------------------------------------------------------------- settings


def test_settings_reach_the_compiler():
    seen = []
    settings = {"force_eager": True, "post_grad_custom_pre_pass": lambda *given: seen.append(given)}
    check(torch.sin, [(torch.ones(3),)], {"inner_options": settings})
    ((gm, _, config),) = seen
    assert isinstance(gm, fx.GraphModule) and bool(config.force_eager)


def test_a_last_pass_of_the_users_own_runs_before_operands_are_told_apart():
    seen = []

    def last(gm, *_):
        seen.append([node.target for node in gm.graph.nodes])

    settings = {"force_eager": True, "post_grad_custom_post_pass": last}
    check(differences, [(torch.randint(0, 9, (2, 24)),)], {"inner_options": settings})
    assert len(seen) == 1 and torch.ops.aten.clone.default not in seen[0]


BAD = cases.bad_settings("npugraph_ex", "force_eager", "force_eagr", ("capture_limit", 0, "Please set value in [1, "))


@pytest.mark.parametrize("settings, message", BAD, ids=[str(settings) for settings, _ in BAD])
def test_a_bad_setting_is_one_error(settings, message):
    with pytest.raises(sgl_npu.OptionsError) as error:
        compiled(torch.sin, {"inner_options": settings})(torch.ones(2, device="npu"))
    assert str(error.value).count(message) == 1
    assert "Traceback" not in str(error.value)


def test_a_mode_is_refused():
    with pytest.raises(sgl_npu.OptionsError, match="modes are Inductor's, and inner is 'npugraph_ex'"):
        compiled(torch.sin, {"mode": "max-autotune", **EAGER})(torch.ones(2, device="npu"))


def test_inductor_is_refused():
    with pytest.raises(sgl_npu.OptionsError, match="Inductor does not compile for NPU tensors"):
        compiled(torch.sin, {"inner": "inductor"})(torch.ones(2, device="npu"))


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("case", PACKED)
def test_one_graph_serves_every_length_of_packed_sequences(case, handed_over):
    function, calls = PACKED[case]
    (report,) = check(function, calls, EAGER, dynamic=True)
    assert report.sites[0].kernel == "ascend_fa_sink", report.sites[0].refusals
    (graph,) = handed_over
    (node,) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.npu.npu_fused_infer_attention_score_v2.default
    )
    lengths = [*node.kwargs["actual_seq_qlen"], *node.kwargs["actual_seq_kvlen"]]
    assert all(not isinstance(x, fx.Node) or x.op == "placeholder" for x in lengths)


def test_another_head_count_is_another_graph_with_symbolic_lengths():
    reports = cases.check_head_counts(EAGER)
    assert [cases.fia_argument(report, "num_heads") for report in reports] == ["20", "5"]
    assert all("s" in report.sites[0].query[2] for report in reports)


# ---------------------------------------------------------------- canonical nodes


@pytest.mark.parametrize("case", ["causal", "softcap, which no kernel has", "sinks and lse"])
def test_no_canonical_node_reaches_the_compiler(case, handed_over):
    function, calls = {**CASES, **MERGES}[case]
    check(function, calls, EAGER)
    assert handed_over and not canonical(handed_over)


def canonical(graphs):
    return [node for gm in graphs for node in gm.graph.nodes if str(node.target).startswith("sgl_npu.attention")]


def test_a_canonical_node_is_an_internal_error_that_names_it():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(cases.ATTENTION, (x, x, x)))
    with pytest.raises(RuntimeError, match=r"internal error: attention_default \(sgl_npu.attention.default\) reached"):
        refuse_canonical_nodes(fx.GraphModule(torch.nn.Module(), graph), "npugraph_ex")


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("model, dtype", [(Block, FP32), (cases.Sdpa, BF16)])
def test_a_training_step_has_the_gradients_of_the_cpu(model, dtype, handed_over):
    cases.check_training(model(dtype), [rand(2, n, WIDTH, dtype=dtype) for n in (24, 31)], EAGER)
    assert len(handed_over) >= 2 and not canonical(handed_over)


# ---------------------------------------------------------------- state


def test_a_mask_in_a_buffer_may_change_between_calls():
    cases.check_buffer(EAGER)


# ---------------------------------------------------------------- what npugraph_ex gets wrong by itself


def plain(function, x):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend="npugraph_ex", options={"force_eager": True})(x.to("npu")).cpu()


def test_differences_of_neighbours_are_right_although_npugraph_ex_writes_over_its_operand():
    """The first half documents torch_npu 2.13. Once it fails, npugraph_ex has learnt it: passes/overlap.py can go."""
    x = torch.arange(24).view(2, 12) % 5
    assert not torch.equal(plain(differences, x), differences(x)), "npugraph_ex sees operands in the same memory now"
    check(differences, [(x,)], EAGER)


def test_derived_lengths_are_taken_although_npugraph_ex_refuses_them():
    """The first half documents torch_npu 2.13. Once it fails, passes/hoist.py can go."""

    def lengths(x):
        size = x.shape[0] // 2
        query = x.unflatten(-1, (HEADS, -1))
        settings = {"num_query_heads": HEADS, "num_key_value_heads": HEADS, "input_layout": "TND"}
        lists = {"actual_seq_qlen": [size, 2 * size], "actual_seq_kvlen": [size, 2 * size]}
        return torch.ops.npu.npu_fused_infer_attention_score_v2(query, query, query, **lists, **settings)[0]

    torch._dynamo.reset()
    run = torch.compile(lengths, backend="npugraph_ex", dynamic=True, options={"force_eager": True})
    with pytest.raises(Exception, match="only sym and constant is supported"), torch.no_grad():
        run(rand(48, WIDTH).to("npu"))
    check(lengths, [(rand(n, WIDTH),) for n in (48, 30, 62)], EAGER, dynamic=True)
