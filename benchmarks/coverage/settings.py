"""How the backends are called: the one place that knows their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("sgl_npu", "inductor")
MODES = {"static": False, "dynamic": True, "mark-dynamic": None}


def backend_options(platform: str) -> dict[str, Any]:
    """Ours: a failing pass is an error, and the rewritten graph runs op by op, so that ops can be counted."""
    import sgl_npu

    options: dict[str, Any] = {"platform": platform, "inner": "eager", "strict": True}
    if "formulas" in sgl_npu.Options.model_fields:
        options["formulas"] = True
    return options


def resolve_backend(name: str, platform: str) -> Callable:
    """A Dynamo backend: ours with its options, or Inductor up to where it has matched attention."""
    if name == "inductor":
        return _inductor_matching
    ours = torch._dynamo.lookup_backend(name)
    options = backend_options(platform)
    return lambda gm, inputs: ours(gm, inputs, options=options)


def _inductor_matching(gm: torch.fx.GraphModule, inputs: Any) -> Callable:
    """Inductor's passes without its code generation: its matcher counts in Dynamo's counters."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, inner_compile=lambda part, *args, **kwargs: make_boxed_func(part.forward))
