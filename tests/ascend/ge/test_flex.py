"""FlexAttention converts to GE as one fused attention, without the lists of its BlockMask."""

import flex_cases
import pytest
from stand_in import ge


@pytest.mark.parametrize("case", flex_cases.CASES)
def test_it_converts(case):
    with ge.converted() as graphs:
        flex_cases.check(case, {"inner": "torchair", "inner_options": {"debug.run_eagerly": True}})
    for graph in graphs:
        found = ge.ops(graph)
        assert found["FusedInferAttentionScore"] == 1 and not any("Sort" in op or "TopK" in op for op in found), found
