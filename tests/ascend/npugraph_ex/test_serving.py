"""A serving step goes to npugraph_ex whole: caches written in place, lists of lengths as inputs, one graph for all."""

import hand_over_cases as cases
import pytest
import torch
from serving_cases import STEPS, check_documents, check_varlen
from torch import fx

from sgl_npu.compiler import inner_ascend

EAGER = {"inner_options": {"force_eager": True}}
FIA = torch.ops.npu.npu_fused_infer_attention_score.default


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", STEPS)
def test_one_graph_gives_what_eager_gives_at_every_step(case, monkeypatch):
    function, calls, kernel, mode = STEPS[case]
    handed_over = cases.recorded(inner_ascend.NpugraphEx, monkeypatch)
    with inner_ascend.recording() as made:
        (report,) = cases.check(function, calls, EAGER, dynamic=True)
    assert "'actual_seq_lengths_kv': [('index'" in made[0].compiled.get_code(), "a replay would not update the lengths"
    (site,) = report.sites
    assert (site.kernel, cases.fia_argument(report, "sparse_mode")) == (kernel, mode), site.refusals
    (graph,) = handed_over
    (node,) = graph.graph.find_nodes(op="call_function", target=FIA)
    lengths = [*node.kwargs.get("actual_seq_lengths", []), *node.kwargs["actual_seq_lengths_kv"]]
    assert all(not isinstance(x, fx.Node) or x.op == "placeholder" for x in lengths)


@pytest.mark.parametrize("case", [case for case in STEPS if case != "packed prefill"])
def test_the_cache_is_written_in_place(case):
    function, calls, *_ = STEPS[case]
    with inner_ascend.recording() as made:
        cases.check(function, calls[:1], EAGER)
    code = made[0].compiled.get_code()
    assert code.count("npu_scatter_nd_update_.default(") == 2
    assert "npu_scatter_nd_update.default(" not in code and "copy_" not in code


def test_lists_of_lengths_that_change_recompile_once():
    function, calls, *_ = STEPS["prefill and decode"]
    reports = cases.check(function, calls, EAGER)
    assert len(reports) == 2, "the first graph has the lengths as numbers, the second as inputs"


def test_varlen_attention_goes_through():
    """Its tensor of lengths is read before the graph runs."""
    with inner_ascend.recording() as made:
        (site,) = check_varlen(EAGER).sites
    assert "'actual_seq_lengths_kv': [('index'" in made[0].compiled.get_code(), "a replay would not update the lengths"
    assert (site.spelling, site.kernel) == ("varlen_attn", "ascend_packed"), site.refusals


def test_documents_that_position_ids_tell_go_through():
    with inner_ascend.recording() as made:
        (report,) = check_documents(EAGER)
    assert report.sites[0].kernel == "ascend_packed"
    code = made[0].compiled.get_code()
    assert "'actual_seq_lengths_kv': [('index'" in code, "a replay would not update the ends"
