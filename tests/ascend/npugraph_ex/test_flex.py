"""FlexAttention goes through npugraph_ex as one fused attention."""

import flex_cases
import pytest


@pytest.mark.parametrize("case", flex_cases.CASES)
def test_it_compiles(case):
    flex_cases.check(case, {"inner_options": {"force_eager": True}})
