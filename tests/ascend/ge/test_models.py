"""Models that nobody prepared, converted to GE whole by torchair."""

import pytest
import torch
from model_cases import MODELS, cases, check
from stand_in import ge


@pytest.mark.parametrize(("name", "spelling", "dtype"), cases(torch.float16))
def test_a_model_converts_with_every_attention_fused(name, spelling, dtype):
    with ge.converted() as graphs:
        check(name, spelling, dtype, "torchair", {"debug.run_eagerly": True}, (40, 56), every_size=False)
    (graph,) = graphs
    ops = ge.ops(graph)
    routers = 2 if name == "Qwen3-MoE" else 0
    assert ops["FusedInferAttentionScore"] == MODELS[name].sites and ops["SoftmaxV2"] == routers
