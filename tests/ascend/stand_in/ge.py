"""torchair's conversion of an FX graph to a GE graph without CANN: all of it but four questions to CANN."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


def offline() -> None:
    """Answer these four questions here (private names of torchair, seen in torch_npu 2.13.0)."""
    import torchair._ge_concrete_graph.compat_ir as compat_ir
    import torchair._ge_concrete_graph.fx2ge_converter as converter
    import torchair.ge.ge_custom as ge_custom

    # Starts the graph engine, which conversion does not use.
    converter.initialize_graph_engine = lambda *_, **__: None
    # Asks the installed CANN whether it has an operator; an empty answer means that nothing is in the way.
    compat_ir.is_cann_compat = lambda *_, **__: ""
    # Asks for an operator that is called by name: CANN has those that torchair was generated from.
    ge_custom._torchair.get_registered_ir_def = lambda name: (_answer(name), [], [], [])
    # Writes the .air file of `dynamo_export`; the readable dynamo.pbtxt beside it is Python's own.
    converter._torchair.export = lambda *_, **__: None


def _answer(name: str) -> str:
    from torchair._ge_concrete_graph import auto_generated_ge_raw_ops, dynamic_output_ops

    known = any(hasattr(module, name) for module in (auto_generated_ge_raw_ops, dynamic_output_ops))
    return "SUCCESS" if known else "ERROR"


@contextmanager
def callbacks() -> Iterator[None]:
    """Convert operators without a converter as where CANN is: torchair compiles a call back into PyTorch for each.

    Here nothing is compiled, and the operator that it would be is answered for (private names of torch_npu 2.13.0).
    """
    import torchair._ge_concrete_graph.custom_op_compiler as compiler
    import torchair.ge.ge_custom as ge_custom

    asked = ge_custom._torchair.get_registered_ir_def

    def answer(name: str) -> Any:
        return ("SUCCESS", [], [], []) if "__" in name else asked(name)

    nothing = patch.object(compiler, "compile_and_load", lambda *_, **__: None)
    with nothing, patch.object(ge_custom._torchair, "get_registered_ir_def", answer):
        yield


@contextmanager
def converted() -> Iterator[list[Any]]:
    """The GE graphs (`GeConcreteGraph`) that are converted inside, each as it is after torchair's own passes."""
    from torchair._ge_concrete_graph.fx2ge_converter import GeConcreteGraph

    graphs: list[Any] = []
    last_pass = GeConcreteGraph.optimize_graph_without_runtime

    def record(graph: Any, *args: Any, **kwargs: Any) -> Any:
        result = last_pass(graph, *args, **kwargs)
        graphs.append(graph)
        return result

    with patch.object(GeConcreteGraph, "optimize_graph_without_runtime", record):
        yield graphs


def ops(graph: Any) -> Counter[str]:
    """How often each GE operator occurs in a converted graph (`GeConcreteGraph`)."""
    return Counter(op.type for op in graph.graph.op)
