"""What is measured. Each function returns one table: a list of rows of text, the first row its heading."""

from __future__ import annotations

import re
import time

import torch
from decode import BATCHES as DECODE_BATCHES
from decode import LAYERS as DECODE_LAYERS
from decode import measure as measure_decode
from layer import GPU_LENGTHS as GPU_LENGTHS_OF_LAYER
from layer import LENGTHS as LENGTHS_OF_LAYER
from layer import measure as measure_layer
from models import SPEED_MODELS, llama
from replay import BATCHES, LAYERS
from replay import measure as measure_replay
from video_attention import GPU_GRIDS as GPU_VIDEO_GRIDS
from video_attention import GRIDS as VIDEO_GRIDS
from video_attention import measure as measure_video
from video_attention import quality as measure_video_quality

import sgl_npu
from sgl_npu.compiler.demo import demo_models, measure_cpu, measure_npu
from sgl_npu.compiler.timing import first_output, max_error

Table = list[list[str]]


def demo() -> Table:
    """Every attention of the demo models: fused, how far from eager, and in how many graphs against plain Dynamo."""
    rows = [["model", "platform", "dtype", "attentions fused", "ops", "max error vs eager", "graphs (eager backend)"]]
    for build in demo_models().values():
        for dtype in (torch.float32, torch.bfloat16):
            for measure in (lambda model: measure_cpu(model, runs=1), measure_npu):
                model = build().to(dtype)
                found = measure(model)
                report = found.report
                ops = ", ".join(f"{count} {op}" for op, count in report.counts().items())
                graphs = f"{len(report.graphs)} ({_plain_graphs(model)})"
                fused = f"{report.fused} of {len(report.sites)}"
                rows.append([found.model, found.platform, found.dtype, fused, ops, f"{found.error:.1e}", graphs])
    return rows


def _plain_graphs(model) -> int:
    """How many graphs Dynamo makes of the model for a backend that does nothing."""
    seen = []

    def backend(gm, inputs):
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.module, backend=backend)(**model.inputs)
    return len(seen)


def speed(runs: int = 40) -> Table:
    """CPU time of one forward pass; the variants take turns within one process."""
    rows = [["model", "dtype", "eager / ours", "plain Inductor / ours", "runs"]]
    for build in SPEED_MODELS.values():
        for dtype in (torch.float32, torch.bfloat16):
            torch._dynamo.reset()
            found = measure_cpu(build().to(dtype), runs)
            median = {timing.variant: timing.median for timing in found.timings}
            ratios = [f"{median[name] / median['sgl_npu']:.2f}x" for name in ("eager", "inductor")]
            rows.append([found.model, found.dtype, *ratios, str(runs)])
    return rows


LENGTHS = (37, 41, 64, 99, 128, 200, 33, 20)


@torch.no_grad()
def npu_graph() -> Table:
    """The NPU graph of a Llama: what stands around each attention, and how many graphs eight lengths need."""
    layers = 4
    model = llama(layers).to(torch.bfloat16)
    torch._dynamo.reset()
    seen = len(sgl_npu.reports())
    compiled = torch.compile(model.module, backend="sgl_npu", options={"platform": "npu", "strict": True})
    worst = 0.0
    for length in LENGTHS:
        tokens = torch.randint(0, 128, (2, length))
        torch._dynamo.mark_dynamic(tokens, 1)
        worst = max(worst, max_error(first_output(compiled(tokens)), first_output(model.module(tokens))))
    found = sgl_npu.reports()[seen:]
    lines = found[-1].graph.splitlines()
    names = {line.split(":")[0]: line for line in lines if ":" in line}
    around = {"transpose": 0, "clone": 0, "expand": 0}
    for line in lines:
        if "npu.npu_fused_infer_attention_score(" in line:
            neighbours = [names[name] for name in re.findall(r"\w+", line.split("(", 1)[1]) if name in names]
            outputs = [other for other in lines if f"({line.split(':')[0]}," in other]
            users = [other for out in outputs for other in lines if f"({out.split(':')[0]}," in other]
            for text in neighbours + users:
                for op in around:
                    around[op] += f"aten.{op}" in text
    return [
        ["what", "count"],
        ["FIA ops per layer", f"{sum('npu.npu_fused_infer_attention_score(' in line for line in lines) / layers:g}"],
        *([f"{op} next to an FIA op, all {layers} layers", str(count)] for op, count in around.items()),
        [f"graphs for {len(LENGTHS)} lengths", str(len(found))],
        ["max error vs eager over these lengths, bf16", f"{worst:.1e}"],
    ]


@torch.no_grad()
def compile_time() -> Table:
    """Seconds of one compilation, caches off, and the parts that are ours."""
    rows = [
        ["Llama", "layers", "capture + passes, s", "match + mask, s", "whole, s", "ours", "match + mask", "ms a layer"]
    ]
    with torch._inductor.config.patch(force_disable_caches=True):
        for attention, spelling in (("sdpa", "SDPA"), ("eager", "by hand")):
            for layers in (6, 12, 24, 48):
                model = llama(layers, attention=attention)
                torch._dynamo.reset()
                start = time.perf_counter()
                torch.compile(model.module, backend="sgl_npu")(**model.inputs)
                whole = time.perf_counter() - start
                seconds = sgl_npu.reports()[-1].seconds
                ours, matching = seconds["capture"] + seconds["passes"], seconds["match"] + seconds["mask"]
                shares = (f"{100 * part / whole:.1f} %" for part in (ours, matching))
                cells = f"{ours:.2f}", f"{matching:.2f}", f"{whole:.1f}", *shares, f"{1000 * ours / layers:.1f}"
                rows.append([spelling, str(layers), *cells])
    return rows


def layer(runs: int = 15) -> Table:
    """A Llama attention layer written by hand: time and peak memory beside plain Inductor and a hand-called SDPA."""
    return _layer((torch.float32, torch.bfloat16), LENGTHS_OF_LAYER, runs, "cpu")


def layer_gpu(runs: int = 50) -> Table:
    return _layer((torch.bfloat16,), GPU_LENGTHS_OF_LAYER, runs, "cuda")


def _layer(dtypes, lengths, runs: int, device: str) -> Table:
    rows = [["dtype", "S", "Inductor / ours", "hand-called SDPA / ours", "peak MB: Inductor", "SDPA", "ours", "runs"]]
    if device == "cuda":
        rows[0].insert(2, "ours, ms")
    for dtype in dtypes:
        for length in lengths:
            found = measure_layer(dtype, length, runs, device)
            ratios = [f"{found[name][0] / found['ours'][0]:.2f}x" for name in ("inductor", "sdpa")]
            peaks = [f"{found[name][1]:.0f}" for name in ("inductor", "sdpa", "ours")]
            times = [f"{1000 * found['ours'][0]:.2f}"] if device == "cuda" else []
            rows.append([str(dtype).removeprefix("torch."), str(length), *times, *ratios, *peaks, str(runs)])
    return rows


def sparse_speed(runs: int = 3) -> Table:
    """Attention over the tokens of a video on one thread, dense and sparse."""
    return _sparse_speed((torch.float32, torch.bfloat16), VIDEO_GRIDS, runs, "cpu")


def sparse_speed_gpu(runs: int = 20) -> Table:
    return _sparse_speed((torch.bfloat16,), GPU_VIDEO_GRIDS, runs, "cuda")


def _sparse_speed(dtypes, grids, runs: int, device: str) -> Table:
    rows = [
        [
            *("method", "dtype", "tokens", "sparsity", "density", "speed-up"),
            *("of 1 / density", "selection / dense", "runs"),
        ]
    ]
    if device == "cuda":
        rows[0][5:5] = ["dense, ms", "ms"]
    for dtype in dtypes:
        for grid in grids:
            for row in measure_video(grid, dtype, runs, device):
                shares = [f"{100 * row[name]:.0f} %" for name in ("density", "of_ideal", "selection")]
                cells = [row["method"], row["dtype"], str(row["length"]), f"{row['sparsity']:g}", shares[0]]
                times = [f"{1000 * row[name]:.2f}" for name in ("dense_seconds", "seconds")]
                rows.append(
                    [*cells, *(times if device == "cuda" else []), f"{row['speedup']:.2f}x", *shares[1:], str(runs)]
                )
    return rows


def sparse_quality() -> Table:
    """What block-sparse attention and rain fusion lose, beside a random choice of as many blocks."""
    rows = [["method", "tokens", "sparsity", "density", "recall", "of random blocks", "error", "of random blocks"]]
    for row in measure_video_quality((8, 32, 32)):
        cells = [row["method"], str(row["length"]), f"{row['sparsity']:g}"]
        names = ("density", "recall", "random_recall", "error", "random_error")
        rows.append([*cells, *(f"{100 * row[name]:.1f} %" for name in names)])
    return rows


def decode(runs: int = 30) -> Table:
    """A step of decoding against a static cache, beside plain Inductor."""
    rows = [["layers", "dtype", "batch", "plain Inductor / ours", "runs"]]
    for dtype in (torch.float32, torch.bfloat16):
        for batch in DECODE_BATCHES:
            found = measure_decode(batch, dtype, runs)
            ratio = f"{found['inductor'] / found['ours']:.2f}x"
            rows.append([str(DECODE_LAYERS), str(dtype).removeprefix("torch."), str(batch), ratio, str(runs)])
    return rows


def replay_gpu(runs: int = 500) -> Table:
    """A step of decoding: a replay of torch's own graph with its copies by hand, and what others take more.

    In brackets, how much longer it takes until the call returns, of which the device knows nothing.
    """
    others = {
        "by hand, again": "captured by hand again",
        "runner, view": "runner, views",
        "runner, copy": "runner, copies",
    }
    rows = [["layers", "batch", "eager, µs", "by hand, µs", *(f"{text}: more, µs" for text in others.values()), "runs"]]
    for batch in BATCHES:
        found = measure_replay(batch, runs)
        one = found["by hand"]
        more = [
            f"{1e6 * (x.step - one.step):+.1f} ({1e6 * (x.call - one.call):+.1f})"
            for x in map(found.__getitem__, others)
        ]
        times = [f"{1e6 * found[name].step:.0f}" for name in ("eager", "by hand")]
        rows.append([str(LAYERS), str(batch), *times, *more, str(runs)])
    return rows


TABLES = {
    "demo": demo,
    "layer": layer,
    "speed": speed,
    "npu_graph": npu_graph,
    "compile_time": compile_time,
    "decode": decode,
    "sparse_speed": sparse_speed,
    "sparse_quality": sparse_quality,
}
# Tables of absolute times, on the one machine with a GPU that a table names.
GPU_TABLES = {"layer_gpu": layer_gpu, "sparse_speed_gpu": sparse_speed_gpu, "replay_gpu": replay_gpu}
