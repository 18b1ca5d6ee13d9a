"""Models that nobody prepared, through npugraph_ex on the stand-in: executed, every length in one graph."""

import pytest
import torch
from model_cases import LENGTHS, cases, check


@pytest.mark.parametrize(("name", "spelling", "dtype"), cases(torch.float16, torch.bfloat16))
def test_a_model_is_one_graph_of_fused_attention_and_equals_the_cpu(name, spelling, dtype):
    lengths = LENGTHS if dtype == torch.float16 else LENGTHS[:1]
    check(name, spelling, dtype, "npugraph_ex", {"force_eager": True}, lengths)
