"""A mask built from positions means the same whether it was traced on the CPU or on an NPU."""

import pytest
import torch
from both_devices import CPU, NPU, default_device
from mask_cases import ALWAYS, BOTTOM_RIGHT, CAUSAL_AND_PADDING, KEPT, NAMED, ODD, PADDINGS, TOP_LEFT, WINDOWS
from test_mask import proved

from sgl_npu.passes.kept_ops import without_kept

TABLES = {
    "causal": dict(list(TOP_LEFT.items())[::3]),  # a third of them: to prove is what takes its time
    "bottom-right": BOTTOM_RIGHT,
    "windows": WINDOWS,
    "always": ALWAYS,
    "padding": PADDINGS,
    "causal and padding": CAUSAL_AND_PADDING,
    "kept": dict(list(KEPT.items())[::2]),
    "named": NAMED,
    "odd": ODD,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_mask_of_any_length_is_proved_alike_on_both(name):
    def words(device):
        with default_device(device):
            makes = {key: row[0] if isinstance(row, tuple) else row for key, row in TABLES[name].items()}
            return {key: proved(make, without_kept({})) for key, make in makes.items()}

    torch.manual_seed(0)
    on_npu = words(NPU)
    assert on_npu == words(CPU)
