"""Masks as coarse pictures: of a condition on i and j, or of a tensor."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import sympy
import torch
import torch.nn.functional as F
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sgl_npu.compiler.trace import Raster
from sgl_npu.passes.band import BATCH, HEAD, KEY, ROW

CELLS = 96  # rows and columns at most
_FINE = 3  # points of a cell that a condition is asked about, each way
_LEVELS = 4
# torch's own functions of whole numbers, by the names they have in its formulas.
_WHOLE = {"FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": operator.mod, "PythonMod": operator.mod}


def of_condition(condition: sympy.Basic, sizes: Mapping[sympy.Symbol, int], rows: int, keys: int) -> Raster | None:
    """The picture of a condition on i and j; None where data has a say, or another index."""
    condition = condition.subs({**sizes, BATCH: 0, HEAD: 0})
    if condition.atoms(AppliedUndef) or not condition.free_symbols <= {ROW, KEY}:
        return None
    with unset_fake_temporarily():  # a call on fake tensors is compiled in their mode
        try:
            decide = sympy.lambdify((ROW, KEY), condition, [_WHOLE, "numpy"])
            queries, columns = points(rows).numpy()[:, None], points(keys).numpy()[None]
            found = torch.as_tensor(decide(queries, columns) | (queries < 0) | (columns < 0))
        except (ImportError, TypeError, ValueError, NameError, AttributeError, KeyError):
            return None  # no numpy, or an operation of the prover's own that it has no name for
        return Raster("", _lines(found, min(rows, CELLS), min(keys, CELLS)))


def of_tensor(mask: Tensor, caption: str) -> Raster:
    """The picture of a mask, bool (rows, keys), True where a key may be attended."""
    rows, keys = (min(size, CELLS) for size in mask.shape)
    queries, columns = (points(size).to(mask.device) for size in mask.shape)
    return Raster(caption, _lines(mask[queries][:, columns].cpu(), rows, keys))


def readable(condition: sympy.Basic) -> str:
    """A condition as a reader knows it: i is a query, j a key."""
    text = str(condition)
    return text if len(text) <= 200 else f"{text[:197]}..."


def points(size: int) -> Tensor:
    """Int64, ascending: what is looked at of as many indices, at most `_FINE` of each cell."""
    count = min(size, CELLS * _FINE)
    return torch.arange(count) * size // max(count, 1)


def _lines(found: Tensor, rows: int, columns: int) -> str:
    shares = F.adaptive_avg_pool2d(found.float()[None], (rows, columns))[0]
    levels = (shares * _LEVELS).ceil().int().tolist()
    return "\n".join("".join(map(str, line)) for line in levels)
