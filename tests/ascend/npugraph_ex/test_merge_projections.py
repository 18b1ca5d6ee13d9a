"""Merged projections go through npugraph_ex: the weight is a parameter, at one address while weights are written to."""

import merge_cases as cases
import pytest
import torch
from rotary_cases import HIDDEN

from sgl_npu.compiler import inner_ascend

OPTIONS = {"inner_options": {"force_eager": True}}


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    torch.manual_seed(0)
    cases.install_kernel(monkeypatch)


@pytest.mark.parametrize("norm", ["llama", "none"])
def test_the_answer_is_that_of_the_weights_as_they_are(norm):
    cases.check_changes(norm, OPTIONS)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="sgl_npu", options=OPTIONS | {"merge_projections": True})


def test_merged_weights_are_parameters_which_no_replay_copies(monkeypatch):
    """npugraph_ex takes what has the mark for a parameter (torch_npu 2.13, AclConcreteGraph.parse_input)."""
    seen, compile_part = [], inner_ascend.NpugraphEx._compile

    def record(self, gm, inputs):
        seen.append([hasattr(x, "_torchair_is_parameter") for x in inputs])
        return compile_part(self, gm, inputs)

    monkeypatch.setattr(inner_ascend.NpugraphEx, "_compile", record)
    run = compiled(cases.Layers("llama").eval().to("npu"))
    with torch.no_grad():
        run(torch.randn(2, 9, HIDDEN, device="npu"), torch.arange(9, device="npu"))
    (marks,) = seen
    assert marks.count(False) == 2 and all(marks[-4:])  # the two inputs; a weight and a bias for each layer


def test_a_graph_that_was_captured_finds_changed_weights_where_the_old_ones_were(monkeypatch):
    """What npugraph_ex has captured is found again by the addresses of parameters (get_unupdated_input_fn)."""
    seen, compile_part = [], inner_ascend.NpugraphEx._compile

    def record(self, gm, inputs):
        run = compile_part(self, gm, inputs)
        where = [i for i, x in enumerate(inputs) if hasattr(x, "_torchair_is_parameter")]

        def called(*args):
            seen.append([args[i].data_ptr() for i in where])
            return run(*args)

        return called

    monkeypatch.setattr(inner_ascend.NpugraphEx, "_compile", record)
    model = cases.Layers("llama").eval().to("npu")
    run = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            run(torch.randn(2, 9, HIDDEN, device="npu"), torch.arange(9, device="npu"))
            model.load_state_dict({name: torch.randn_like(x) for name, x in model.state_dict().items()})
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
