"""When the sparse one of the two compiled forms of a graph runs.

Dense in the first steps of a denoising loop, and where a sequence is too short for the sparse kernel. The choice is
made outside of the compiled graphs, so neither a step nor a length compiles anything again, and each can be captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import fx

from sgl_npu.compiler.two_forms import Condition
from sgl_npu.lowering.sparse.setting import SparseSetting
from sgl_npu.lowering.sparse.table import fewest_tokens
from sgl_npu.passes.graph_sizes import sizes_function
from sgl_npu.passes.sparse import SparseKernels
from sgl_npu.runtime.denoising import current_step
from sgl_npu.runtime.sizes import expression


def sparse_condition(graph: fx.Graph, kernels: Sequence[SparseKernels]) -> Condition | None:
    """When a graph with sparse kernels runs, as a function of its inputs; None for always.

    `kernels`: those of the graph and of the graphs nested in it.
    """
    found = [length for x in kernels for length in x.lengths]
    if not found:
        return None
    setting, inputs = kernels[0].setting, list(graph.find_nodes(op="placeholder"))
    fewest = fewest_tokens(setting)
    formulas = {expression(x) for x in found if fewest} - {None}
    lengths = sizes_function(inputs, list(formulas)) if formulas else None
    if lengths is None and setting.skip_first_steps == 0:
        return None

    def holds(args: Sequence[Any]) -> bool:
        return _is_sparse_step(setting) and (lengths is None or min(lengths(*args)) >= fewest)

    return holds


def _is_sparse_step(setting: SparseSetting) -> bool:
    if setting.skip_first_steps == 0:
        return True
    step = current_step()
    if step is None:
        warnings.warn(
            f"sgl_npu: skip_first_steps = {setting.skip_first_steps}, but no step was announced, so attention stays "
            "dense; run the model in `with sgl_npu.denoising_step(i):`, or pass sgl_npu.integrations.diffusers."
            "DenoisingSteps() to the pipeline as callback_on_step_end",
            stacklevel=2,
        )
        return False
    return step >= setting.skip_first_steps
