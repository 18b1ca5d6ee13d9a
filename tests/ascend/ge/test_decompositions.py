"""What aten ops without a converter are decomposed into has converters."""

import pytest
import torch
from ge_decomposition_cases import REQUIRED, SAMPLES, SETTINGS
from hand_over_cases import check, compiled
from torch.utils._pytree import tree_leaves, tree_map_only

EAGER = {"inner": "torchair", "platform": "npu", "inner_options": {"debug.run_eagerly": True}}
# Where the result's dimensions are not in order in memory, torch's decomposition ends in a copy that has no converter.
NOT_CONVERTED = {(torch.ops.aten.diag_embed.default, 3)}


@pytest.mark.parametrize("op", SAMPLES, ids=str)
def test_a_decomposed_operator_converts_and_equals_the_cpu(op):
    samples = [args for number, args in enumerate(SAMPLES[op]) if (op, number) not in NOT_CONVERTED]
    settings = ([{}] if op not in REQUIRED else []) + ([SETTINGS[op]] if op in SETTINGS else [])
    created = {} if any(isinstance(x, torch.Tensor) for x in samples[0]) else {"device": "npu"}

    def calls(samples, **created):
        return [op(*args, **given, **created) for given in settings for args in samples]

    with torch.no_grad():
        found = compiled(lambda samples: calls(samples, **created), EAGER)(
            tree_map_only(torch.Tensor, lambda x: x.to("npu"), samples)
        )
    for one, other in zip(tree_leaves(found), tree_leaves(calls(samples)), strict=True):
        torch.testing.assert_close(one.cpu(), other, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_a_histogram_of_integers_converts():
    tokens = torch.randint(0, 9, (24,))
    found = compiled(lambda x: torch.histc(x, 8, 0, 7), EAGER)(tokens.to("npu"))
    assert found.tolist() == torch.histc(tokens.float(), 8, 0, 7).tolist()


def test_repeating_converts_with_symbolic_sizes():
    calls = [(torch.randn(n, m),) for n, m in ((3, 5), (4, 7), (9, 2))]
    check(lambda x: x.repeat_interleave(3, 1), calls, EAGER, dynamic=True)
