"""inner = "torchair" hands over to GE: every node converts, the right numbers, few graphs, clear errors."""

import hand_over_cases as cases
import pytest
import torch
from hand_over_cases import BF16, CASES, FP32, MERGES, PACKED, WIDTH, Block, check, compiled, rand
from stand_in import ge

import sgl_npu
from sgl_npu.compiler import inner_ascend

# Converts to GE, then runs the FX graph.
EAGER = {"inner": "torchair", "inner_options": {"debug.run_eagerly": True}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def handed_over(monkeypatch):
    """Every graph as the compiler gets it."""
    return cases.recorded(inner_ascend.Torchair, monkeypatch)


def targets(graphs):
    return {str(node.target) for gm in graphs for node in gm.graph.nodes}


@pytest.mark.parametrize("case", CASES)
def test_every_call_converts_and_gives_what_eager_gives(case):
    function, calls = CASES[case]
    with ge.converted() as graphs:
        check(function, calls, EAGER)
    assert graphs or case == "nothing to do"


@pytest.mark.parametrize("case", MERGES)
def test_results_that_are_merged_by_their_lse_convert(case, handed_over):
    function, calls = MERGES[case]
    check(function, calls, EAGER)
    assert not {x for x in targets(handed_over) if "logaddexp" in x or x.startswith("sgl_npu.attention")}


def test_what_only_the_training_kernel_takes_is_written_out_for_ge():
    (report,) = check(cases.causal, [(rand(2, 24, WIDTH, dtype=FP32),)], EAGER)
    (site,) = report.sites
    assert not site.fused
    reason = "torchair has no converter of the op to GE; inner 'npugraph_ex' takes it"
    assert ("ascend_fusion_attention", reason) in site.refusals


# ---------------------------------------------------------------- settings


def test_settings_reach_the_compiler():
    seen = []
    settings = {"debug.run_eagerly": True, "post_grad_custom_pre_pass": lambda *given: seen.append(given)}
    check(torch.sin, [(torch.ones(3),)], {"inner": "torchair", "inner_options": settings})
    ((_, _, config),) = seen
    assert bool(config.debug.run_eagerly)


BAD = [
    *cases.bad_settings(
        "torchair", "debug.run_eagerly", "debug.run_eagrly", ("debug.graph_dump.type", "foo", "Value 'foo' ")
    ),
    (
        {"debug": True},
        "inner_options: debug = True: debug of torchair.CompilerConfig is a group of settings; name one of them: ",
    ),
    ({"debug.graph_dump": "py"}, "name one of them: debug.graph_dump.type"),
    ({"debug.zzz": 1}, "'debug.zzz' is not a setting of torchair.CompilerConfig; known are debug."),
    ({"force_eager": True}, "'force_eager' is not a setting of torchair.CompilerConfig; known are debug, "),
]


@pytest.mark.parametrize("settings, message", BAD, ids=[str(settings) for settings, _ in BAD])
def test_a_bad_setting_is_one_error(settings, message):
    with pytest.raises(sgl_npu.OptionsError) as error:
        compiled(torch.sin, {"inner": "torchair", "inner_options": settings})(torch.ones(2, device="npu"))
    assert str(error.value).count(message) == 1
    assert "Traceback" not in str(error.value)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("case", PACKED)
def test_lengths_of_packed_sequences_are_computed_in_the_graph(case):
    function, calls = PACKED[case]
    with ge.converted() as graphs:
        (report,) = check(function, calls, EAGER, dynamic=True)
    assert report.sites[0].kernel == "ascend_fa_sink"
    (graph,) = graphs
    (node,) = (op for op in graph.graph.op if op.type == "FusedInferAttentionScore")
    sources = {op.name: op.type for op in graph.graph.op}
    inputs = {desc.name: source.partition(":")[0] for desc, source in zip(node.input_desc, node.input, strict=True)}
    assert [sources[inputs[name]] for name in ("actual_seq_lengths", "actual_seq_lengths_kv")] == ["Pack", "Pack"]


def test_another_head_count_is_another_graph_with_symbolic_lengths():
    reports = cases.check_head_counts(EAGER)
    assert [cases.fia_argument(report, "num_heads") for report in reports] == ["20", "5"]
    assert all("s" in report.sites[0].query[2] for report in reports)


def test_the_larger_of_two_sizes_converts():
    def larger(x, y):
        return torch.zeros(max(x.shape[0], y.shape[0]), device=x.device) + x.sum() + y.sum()

    check(
        larger, [(rand(n, dtype=FP32), rand(m, dtype=FP32)) for n, m in ((5, 9), (6, 30), (31, 7))], EAGER, dynamic=True
    )


# ---------------------------------------------------------------- training and state


@pytest.mark.parametrize("model, dtype", [(Block, FP32), (cases.Sdpa, BF16)])
def test_a_training_step_has_the_gradients_of_the_cpu(model, dtype, handed_over):
    cases.check_training(model(dtype), [rand(2, n, WIDTH, dtype=dtype) for n in (24, 31)], EAGER)
    assert len(handed_over) >= 2 and not {x for x in targets(handed_over) if x.startswith("sgl_npu.attention")}


def test_a_mask_in_a_buffer_may_change_between_calls():
    cases.check_buffer(EAGER)
