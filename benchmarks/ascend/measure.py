"""One model on the stand-in NPU, compiled by one of Ascend's compilers, alone and with ours before it.

A process can use one of the two compilers, so this is a program of its own:
`python -m stand_in --ge -m benchmarks.ascend.measure Llama torchair`.
It prints one line of JSON for each spelling of the attention and each of "plain" and "ours".
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import sgl_npu
from benchmarks.ascend.graph_facts import facts
from benchmarks.ascend.models import DEEPER, MODELS, TEXT, Model

LENGTHS = (600, 40, 56, 72, 88, 104, 120, 136)  # the first is the one whose bytes are counted
SEQUENCES = (LENGTHS[0], LENGTHS[0] // 2, LENGTHS[0] + TEXT)  # a decoder has half the tokens, some join text to them
DTYPE = torch.float16
CHECKED_OPS = ("FusedInferAttentionScore", "SoftmaxV2")
# GE operators that compute nothing on the device: constants, shapes and their arithmetic on the host.
GE_HOST = ("Data", "Const", "ConstPlaceHolder", "Pack", "Shape", "Gather", "NetOutput", "GatherShapes")


def main(name: str, compiler: str) -> None:
    warnings.filterwarnings("ignore")
    for spelling in MODELS[name].spellings:
        for who in ("plain", "ours"):
            found = measure(MODELS[name], spelling, compiler, who)
            if name in DEEPER and "ge" in found:
                deep = measure(DEEPER[name], spelling, compiler, who, LENGTHS[1:2])["ge"]
                layers = DEEPER[name].sites - MODELS[name].sites  # a site a layer
                found["ge_layer"] = {op: (deep[op] - count) / layers for op, count in found["ge"].items()}
            print(
                json.dumps({"model": name, "spelling": spelling, "compiler": compiler, "who": who} | found), flush=True
            )


def measure(model: Model, spelling: str, compiler: str, who: str, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Compile and run for every length; what the graphs are like, how far from eager on the CPU, or why it failed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reference, module = model.build(spelling).to(DTYPE), model.build(spelling).to(DTYPE).to("npu")
    seen: list[dict[str, Any]] = []
    start, worst, error = time.perf_counter(), 0.0, ""
    with torch.no_grad(), converted_graphs(compiler, who) as ge_graphs:
        compiled = torch.compile(module, dynamic=True, **_settings(compiler, who, lambda gm: seen.append(_facts(gm))))
        try:
            for length in lengths:
                worst = max(worst, _run(model, reference, compiled, length))
        except Exception as failure:
            error = _reason(str(failure))
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    found = {"graphs": graphs, "breaks": breaks, "sites": model.sites, "error": error, "worst": worst}
    found |= {"seconds": round(time.perf_counter() - start, 1), "first": seen[0] if seen else None}
    if who == "ours":
        reports = sgl_npu.reports()
        found["fused"] = sum(site.fused for site in reports[-1].sites) if reports else 0
    return found | ({"ge": _ge_facts(ge_graphs[0])} if ge_graphs else {})


def _reason(message: str) -> str:
    """What could not be compiled, in few words."""
    op = re.search(r"While executing .*?target=([\w.]+)", message)
    return f"no GE converter for {op[1]}" if op else " ".join(message.split())[:300]


def _run(model: Model, reference: torch.nn.Module, compiled: Callable, length: int) -> float:
    torch.manual_seed(length)
    inputs = model.inputs(length)
    expected = reference(**_placed(inputs, "cpu"))[0].float()
    found = compiled(**_placed(inputs, "npu"))[0].cpu().float()
    return ((found - expected).abs().max() / max(1.0, expected.abs().max())).item()


def _placed(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    def place(x: Any) -> Any:
        return x.to(device, DTYPE if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x

    return torch.utils._pytree.tree_map(place, inputs)


def _facts(gm: torch.fx.GraphModule) -> dict[str, Any]:
    return facts(gm.graph, SEQUENCES)


def _settings(compiler: str, who: str, look: Callable[[torch.fx.GraphModule], None]) -> dict[str, Any]:
    """Arguments of torch.compile. `look` gets every graph as Ascend's compiler gets it; none is captured."""

    def hook(gm: torch.fx.GraphModule, *_: Any) -> None:
        look(gm)

    eager = "force_eager" if compiler == "npugraph_ex" else "debug.run_eagerly"
    options = {eager: True, "post_grad_custom_pre_pass": hook}
    if who == "ours":
        return {"backend": "sgl_npu", "options": {"inner": compiler, "inner_options": options, "strict": True}}
    if compiler == "npugraph_ex":
        return {"backend": "npugraph_ex", "options": options}
    import torchair

    config = torchair.CompilerConfig()
    config.debug.run_eagerly = True
    config.post_grad_custom_pre_pass = hook
    return {"backend": torchair.get_npu_backend(compiler_config=config)}


@contextlib.contextmanager
def converted_graphs(compiler: str, who: str) -> Iterator[list[Any]]:
    """The GE graphs that are made inside; the stand-in's launcher has `stand_in` on its path.

    torchair alone has no converter for what SDPA becomes: it gets its calls back into PyTorch, which ours never needs.
    """
    if compiler != "torchair":
        yield []
        return
    import torchair  # noqa: F401
    from stand_in import ge

    with ge.callbacks() if who == "plain" else contextlib.nullcontext(), ge.converted() as graphs:
        yield graphs


def _ge_facts(graph: Any) -> dict[str, int]:
    from stand_in import ge

    ops = ge.ops(graph)
    compute = sum(count for name, count in ops.items() if name not in GE_HOST)
    return {"all": sum(ops.values()), "compute": compute, **{name: ops[name] for name in CHECKED_OPS}}


if __name__ == "__main__":
    main(*sys.argv[1:])
