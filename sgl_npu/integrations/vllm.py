"""vLLM: the names that its compilation config and a platform of it take. Options come from `SGL_NPU_OPTIONS`.

vllm serve MODEL -O.mode=STOCK_TORCH_COMPILE -O.backend=sgl_npu.integrations.vllm.backend

vLLM's own attention is an op of its own, opaque to every compiler: sites are what the model computes besides, and what
`sgl_npu.register_matcher` names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph_module import GraphModule

from sgl_npu import __version__
from sgl_npu.compiler.backend import sgl_npu
from sgl_npu.compiler.graph_copy import copied
from sgl_npu.integrations.environment import environment_options

__all__ = ["backend", "compiler"]


def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
    """`CompilationConfig.backend` of the modes STOCK_TORCH_COMPILE and DYNAMO_TRACE_ONCE, which see the whole graph.

    Raises OptionsError for what SGL_NPU_OPTIONS says wrong.
    """
    return sgl_npu(gm, example_inputs, options=environment_options())


def compiler() -> Any:
    """A CompilerInterface, for mode VLLM_COMPILE: what a platform's `get_compile_backend` names.

    It compiles every piece that vLLM makes of the graph. It keeps nothing on disk: a start compiles again.
    """
    from torch._inductor.compile_fx import graph_returns_tuple, make_graph_return_tuple
    from vllm.compilation.compiler_interface import CompilerInterface

    class Compiler(CompilerInterface):
        name = "sgl_npu"

        def compute_hash(self, vllm_config: Any) -> str:
            return f"sgl_npu {__version__} {sorted(environment_options().items())}"

        def compile(
            self,
            graph: GraphModule,
            example_inputs: list[Any],
            compiler_config: dict[str, Any],
            compile_range: Any,
            key: str | None = None,
        ) -> tuple[Callable[..., Any] | None, Any | None]:
            graph = copied(graph)  # vLLM runs the piece itself, to have the inputs of the next
            with _tracing_as(example_inputs):
                if graph_returns_tuple(graph):
                    return backend(graph, example_inputs), None
                return make_graph_return_tuple(graph, example_inputs, backend), None

    return Compiler()


def _tracing_as(example_inputs: Sequence[Any]) -> contextlib.AbstractContextManager:
    """A piece has fake inputs from Dynamo's tracing, which is over; the context around it is another's."""
    mode = next((x.fake_mode for x in example_inputs if isinstance(x, FakeTensor)), None)
    return contextlib.nullcontext() if mode is None else tracing(TracingContext(mode))
