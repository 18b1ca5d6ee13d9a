"""Ground truth: attention that is seen while a model runs, whatever any backend says of it.

A hand-written site is a matrix product, a softmax of its result over the last dimension, and a product with that.
The first product has to sum over features: one that sums over positions makes channel attention, which is none.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.coverage.features import FeatureAxes

SOFTMAXES = {"_softmax", "_safe_softmax", "_masked_softmax"}
BATCHED = {"bmm", "baddbmm", "addbmm"}
PRODUCTS = BATCHED | {"mm", "addmm"}
FUSED = (
    "_scaled_dot_product",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "_flash_attention",
    "_efficient_attention",
)
# What ends the path from scores to softmax and from there to the second product, though it takes and gives floats.
ENDS = {
    "sum", "mean", "amax", "amin", "max", "min", "norm", "var", "var_mean", "cumsum", "native_layer_norm",
    "native_group_norm", "embedding", "convolution", "linear", "linalg_vector_norm", "_log_softmax", "logsumexp",
    "topk", "sort", "scatter", "scatter_add", "index_add", "index_put",
}  # fmt: skip
# What passes scores on although it changes how many there are.
RESHAPERS = {
    "cat", "slice", "constant_pad_nd", "as_strided", "select", "copy_", "index_select", "split", "split_with_sizes",
    "unbind", "narrow", "expand", "slice_scatter", "unfold", "stack", "index", "gather", "unsafe_split",
}  # fmt: skip


@dataclass
class Softmax:
    """One softmax that was seen: of a product's result or not, inside an SDPA call or not, and how often multiplied."""

    shape: tuple[int, ...]
    of_product: bool
    inside_sdpa: bool
    consumed: int = 0


@dataclass
class Counts:
    handwritten: int = 0
    sdpa: int = 0
    fused_ops: dict[str, int] = field(default_factory=dict)
    shapes: list[list[int]] = field(default_factory=list)


class SiteCounter(TorchDispatchMode):
    """Follows scores from product to softmax to product by the storages they live in."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.softmaxes: list[Softmax] = []
        self.sdpa_calls = 0
        self.inside_sdpa = 0
        self.fused: Counter[str] = Counter()
        self.features = FeatureAxes()
        self._parameters = {_storage(parameter) for parameter in parameters}
        self._scores: dict[int, bool] = {}
        self._weights: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no storage is freed and its address used again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        inputs = [x for x in tree_leaves([args, kwargs or {}]) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name.startswith(FUSED) or func._schema.name.startswith(("sgl_npu::", "npu::")):
            self.fused[func._schema.name] += 1
        elif name in SOFTMAXES:
            self._see_softmax(inputs[0], outputs[0], args)
        elif outputs:
            self._see_other(name, inputs, outputs)
        self.features.see(name, inputs, outputs, any(_storage(x) in self._parameters for x in inputs))
        return out

    def _see_softmax(self, scores: Tensor, out: Tensor, args: tuple) -> None:
        last = args[1] % max(scores.dim(), 1) == scores.dim() - 1
        of_product = last and _storage(scores) in self._scores
        self.softmaxes.append(Softmax(tuple(scores.shape), of_product, self.inside_sdpa > 0))
        self._mark(self._weights, out, len(self.softmaxes) - 1)

    def _see_other(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name in PRODUCTS:
            for x in inputs:
                if (found := self._weights.get(_storage(x))) is not None:
                    self.softmaxes[found].consumed += 1
            projection = name not in BATCHED and any(_storage(x) in self._parameters for x in inputs)
            if not projection and self.features.sums_over_features(*inputs[-2:]):
                self._mark(self._scores, outputs[0], True)
            return
        if name in ENDS:
            return
        for table in (self._scores, self._weights):
            for x in inputs:
                found = table.get(_storage(x))
                if found is None or not x.is_floating_point():
                    continue
                for out in outputs:
                    if out.is_floating_point() and _storage(out) not in table and _carries(name, x, out):
                        self._mark(table, out, found)

    def _mark(self, table: dict, tensor: Tensor, value: Any) -> None:
        self._alive.append(tensor.untyped_storage())
        table[_storage(tensor)] = value

    def counts(self) -> Counts:
        sites = [s for s in self.softmaxes if s.of_product and s.consumed and not s.inside_sdpa]
        return Counts(len(sites), self.sdpa_calls, dict(self.fused), [list(s.shape) for s in sites])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _carries(name: str, x: Tensor, out: Tensor) -> bool:
    if name in RESHAPERS or out.numel() == x.numel():
        return True
    return out.dim() >= 2 and x.dim() >= 2 and out.shape[-2:] == x.shape[-2:]


@contextlib.contextmanager
def count_sites(parameters: Iterable[Tensor] = ()) -> Iterator[SiteCounter]:
    """Count in the body; calls of F.scaled_dot_product_attention are counted wherever they are imported to."""
    counter = SiteCounter(parameters)
    original = F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        counter.sdpa_calls += 1
        counter.inside_sdpa += 1
        try:
            return original(*args, **kwargs)
        finally:
            counter.inside_sdpa -= 1

    places = [
        (names, name)
        for module in list(sys.modules.values())
        if isinstance(names := getattr(module, "__dict__", None), dict)
        and not str(names.get("__name__")).startswith(("torch._C", "torch._dynamo", "torch.fx"))
        for name, value in list(names.items())
        if value is original
    ]
    try:
        for names, name in places:
            names[name] = counted
        with counter:
            yield counter
    finally:
        for names, name in places:
            names[name] = original
