"""How far two outputs are apart, relative to the largest magnitude, and whose fault it is."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from benchmarks.coverage.case import Built

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CACHES = ("past_key_values", "cache_params")


def run(model: Any, built: Built, kwargs: dict[str, Any]) -> list[Tensor]:
    """What a call gives: every float tensor, with zeros where a token is padding."""
    torch.manual_seed(0)  # some models choose patches or tokens by chance
    found = outputs(model(**kwargs))
    if built.valid is None:
        return found
    return [
        x * built.valid.view(*built.valid.shape, *[1] * (x.dim() - 2)) if _is_per_token(x, built) else x for x in found
    ]


def _is_per_token(tensor: Tensor, built: Built) -> bool:
    return built.valid is not None and tensor.shape[:2] == built.valid.shape


def outputs(value: Any) -> list[Tensor]:
    """Every float tensor of a model's output, caches aside."""
    if isinstance(value, Tensor):
        return [value.detach().clone()] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, dict):
        return [x for name, item in value.items() if name not in CACHES for x in outputs(item)]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in outputs(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return outputs({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    return []


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any output, relative to its largest magnitude; inf where shapes or NaNs differ."""
    if len(got) != len(expected):
        return float("inf")
    return max((_error(x, y) for x, y in zip(got, expected, strict=True)), default=0.0)


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    got, expected = got.to(wide), expected.to(wide)
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    if not finite.any():
        return 0.0
    return float((got - expected)[finite].abs().max() / (expected[finite].abs().max() + 1e-30))


def double_outputs(built: Built) -> list[Tensor] | None:
    """What eager computes in float64; None where the model cannot."""
    try:
        model = copy.deepcopy(built.model).double()
        kwargs = torch.utils._pytree.tree_map(_double, built.fresh())
        return run(model, built, kwargs)
    except Exception:
        return None


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
