"""Measure one case: what eager does, what the compiled model does, and what the backend reports."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.coverage.case import Built, Case, Setting
from benchmarks.coverage.counting import Counts, count_sites
from benchmarks.coverage.error import TOLERANCE, double_outputs, relative_error, run
from benchmarks.coverage.settings import MODES, resolve_backend
from benchmarks.coverage.square_masks import SquareMasks

Record = dict[str, Any]
HANDWRITTEN = "softmax between two matmuls"
POSITION_MASKS = ("full", "causal", "band")
MASK_MAKERS = ("flash_cpu_masked", "reference")  # kernels that are given a band as a tensor


def measure(case: Case, setting: Setting, backend: str, platform: str, mode: str) -> Record:
    """One line of the result. `status`: ok, numeric, compile_error, eager_error; the runner adds timeout and crash."""
    record: Record = {
        "case": case.name, "library": case.library, "family": case.family, "spelling": case.spelling,
        "variant": case.variant, "expected": case.sites, "negative": case.negative, "backend": backend,
        "platform": platform, "mode": mode, "dtype": str(setting.dtype).removeprefix("torch."), "seq": setting.seq,
    }  # fmt: skip
    with torch.no_grad():
        try:
            built = case.build(setting)
            expected = run(built.model, built, built.fresh())
        except Exception as error:
            return {**record, **_failure("eager_error", error)}
        try:
            _measure_compiled(record, built, expected, setting, backend, platform, mode)
        except Exception as error:
            record.update(_failure("compile_error", error))
        # Counted last: Dynamo shall not see that F.scaled_dot_product_attention is wrapped.
        with count_sites(_weights(built)) as counter:
            built.model(**built.fresh())
    _compare(record, counter.counts())
    return record


def _failure(status: str, error: Exception) -> Record:
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in frames[-6:]]
    return {"status": status, "error": f"{type(error).__name__}: {error}"[:1500], "places": places}


def _weights(built: Built) -> list[torch.Tensor]:
    return [*built.model.parameters(), *built.model.buffers()]


def _measure_compiled(
    record: Record, built: Built, expected: list, setting: Setting, backend: str, platform: str, mode: str
) -> None:
    import sgl_npu

    torch._dynamo.reset()
    counters.clear()
    watch = _Watch(resolve_backend(backend, platform), _weights(built))
    compiled = torch.compile(built.model, backend=watch, dynamic=MODES[mode])
    marked = mode == "mark-dynamic"
    start = time.perf_counter()
    got = run(compiled, built, _arguments(built, marked))
    seconds = time.perf_counter() - start
    error = relative_error(got, expected)
    record["max_rel"] = error
    record["status"] = "ok" if error <= TOLERANCE[setting.dtype] else "numeric"
    breaks, graphs = sum(counters["graph_break"].values()), watch.graphs
    record.update(graph_breaks=breaks, graphs=graphs, compile_s=round(seconds, 3))
    record["break_reasons"] = sorted(str(reason)[:200] for reason in counters["graph_break"])[:4]
    if error > TOLERANCE[setting.dtype]:
        record.update(_against_double(built, got, expected))
    if backend == "inductor":
        record["matched"] = counters["inductor"]["fuse_attention"]
        return
    reports = sgl_npu.reports()
    sites = [site for report in reports for site in report.sites]
    record["sites"] = [_site(site) for site in sites]
    record["pass_s"] = {
        name: round(sum(r.seconds.get(name, 0.0) for r in reports), 4) for name in ("match", "mask", "passes", "total")
    }
    watch.mask_sizes = _band_sizes(sites, watch.symbols)
    watch.counting = True
    compiled(**_arguments(built, marked))
    left = [counter.counts() for counter in watch.counters]
    record["left"] = sum(count.handwritten for count in left)
    record["left_sdpa"] = sum(count.sdpa for count in left)
    record["square_masks"] = sorted(watch.square_masks)[:6]
    record["square_mask_count"] = len(watch.square_masks)
    if breaks or graphs > 1:
        record["plain_breaks"], record["plain_graphs"] = _plain(built, mode)


def _arguments(built: Built, marked: bool) -> dict[str, Any]:
    """Fresh arguments of a call; `marked`: batch and length of every tensor may vary, as servers say."""
    kwargs = built.fresh()
    for value in kwargs.values() if marked else ():
        if isinstance(value, torch.Tensor):
            for dim in range(min(2, value.dim())):
                torch._dynamo.maybe_mark_dynamic(value, dim)
    return kwargs


class _Watch:
    """A Dynamo backend around another: counts graphs, and what runs in them while it is told to."""

    def __init__(self, backend: Callable, weights: list[torch.Tensor]) -> None:
        self._backend, self._weights = backend, weights
        self.graphs = 0
        self.counting = False
        self.counters: list[Any] = []
        self.mask_sizes: set[tuple[int, int]] = set()
        self.square_masks: list[str] = []
        self.symbols: dict[str, int] = {}

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable:
        compiled = self._backend(gm, inputs)
        self.graphs += 1

        def run(*args):
            self._note_symbols(inputs, args)
            if not self.counting:
                return compiled(*args)
            floats = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
            masks = SquareMasks([*self._weights, *floats], self.mask_sizes)
            with count_sites(self._weights) as counter, masks:
                result = compiled(*args)
            self.counters.append(counter)
            self.square_masks += masks.found
            return result

        return run

    def _note_symbols(self, inputs: Any, args: Any) -> None:
        """The value of every size that has a name in the graph."""
        for traced, real in zip(inputs, args, strict=True):
            if isinstance(traced, torch.SymInt):
                self.symbols[str(traced)] = int(real)
            elif isinstance(traced, torch.Tensor) and isinstance(real, torch.Tensor):
                for name, size in zip(traced.shape, real.shape, strict=True):
                    self.symbols[str(name)] = int(size)


def _site(site: Any) -> Record:
    return {
        "spelling": site.spelling, "module": site.module, "source": site.source, "op": site.op, "kernel": site.kernel,
        "fused": site.fused, "mask": site.mask, "query": list(site.query), "key": list(site.key),
        "refusals": [list(refusal) for refusal in site.refusals],
    }  # fmt: skip


def _band_sizes(sites: list[Any], symbols: dict[str, int]) -> set[tuple[int, int]]:
    """(Sq, Skv) above 1 of the fused sites whose mask is full or a band, with no tensor left.

    A kernel without windows makes a mask of its own from a band: then nothing can be said of that size.
    """
    free, taken = set(), set()
    for site in sites:
        if not site.mask:
            continue
        rows, columns = (symbols.get(size, int(size) if size.isdigit() else 0) for size in (site.query[2], site.key[2]))
        positions = site.mask.startswith(POSITION_MASKS) and not {"tensor", "bias"} & set(site.mask.split())
        if site.kernel in MASK_MAKERS or not positions:
            taken.add((rows, columns))
        elif min(rows, columns) > 1:
            free.add((rows, columns))
    return free - taken


def _plain(built: Built, mode: str) -> tuple[int, int]:
    """Graph breaks and graphs of a backend that does nothing but trace, as every compiler does: that can break too."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    traced = torch._dynamo.lookup_backend("aot_eager")

    def backend(gm, inputs):
        graphs.append(gm)
        return traced(gm, inputs)

    torch.compile(built.model, backend=backend, dynamic=MODES[mode])(**_arguments(built, mode == "mark-dynamic"))
    return sum(counters["graph_break"].values()), len(graphs)


def _against_double(built: Built, got: list, expected: list) -> Record:
    """Where the tolerance is exceeded: how far eager and we are from float64."""
    exact = double_outputs(built)
    if exact is None:
        return {}
    return {"eager_vs_double": relative_error(expected, exact), "ours_vs_double": relative_error(got, exact)}


def _compare(record: Record, truth: Counts) -> None:
    """What eager has, and how much of it the backend found. A site that is decomposed again is found, not fused."""
    record.update(handwritten=truth.handwritten, sdpa=truth.sdpa, shapes=truth.shapes[:8], fused_ops=truth.fused_ops)
    if "sites" not in record:
        return
    written = [site for site in record["sites"] if site["spelling"] == HANDWRITTEN]
    decomposed = sum(site["kernel"] == "reference" for site in record["sites"])
    record["reported"] = len(written)
    record["reported_matched"] = sum(bool(site["mask"]) for site in written)
    record["decomposed"] = sum(site["kernel"] == "reference" for site in written)
    missing = max(0, record.get("left", 0) - decomposed)
    record["matched"] = max(0, truth.handwritten - missing)
    others = [site for site in record["sites"] if site["spelling"] != HANDWRITTEN]
    record["sdpa_sites"], record["sdpa_fused"] = len(others), sum(bool(site["mask"]) for site in others)
