"""DTensor's sharding rules: which ops compute their part of a sharded result from parts of their inputs alone.

The rules are asked with the sizes at hand and a mesh of two ranks; they depend on neither. The sharding propagator is
private: the names below are those of torch 2.13. No process group is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.utils import _pytree as pytree

from sgl_npu.runtime.sizes import hint

_rules: dict[Any, tuple[list[int | None], list[int | None]] | None] = {}


def parallel_dims(
    target: Any, args: Any, kwargs: Any, given: Sequence[int | None]
) -> tuple[list[int | None], list[int | None]] | None:
    """(the dimension each operand must be sharded on, that of each output) where no communication is needed.

    `args` and `kwargs` hold fake tensors; `given` is the dimension that each of them, in order, is sharded on, None
    where it is whole and may be sliced. None if the op has no rule, or one that would move data.
    """
    leaves, tree = pytree.tree_flatten((args, kwargs))
    key = (target, tree, tuple(_key(x) for x in leaves), tuple(given))
    if key not in _rules:
        with unset_fake_temporarily():
            _rules[key] = _ask(target, leaves, tree, given)
    return _rules[key]


def _key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(hint(size) for size in leaf.shape), leaf.dtype
    return type(leaf).__name__, hint(leaf)


def _ask(target: Any, leaves: list[Any], tree: Any, given: Sequence[int | None]):
    dims = iter(given)
    asked = [_spec(leaf, next(dims)) if isinstance(leaf, torch.Tensor) else hint(leaf) for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(asked, tree)
    propagator = DTensor._op_dispatcher.sharding_propagator
    tables = [
        getattr(propagator, name, {}) for name in ("op_to_schema_info", "op_to_schema_info_for_single_dim_strategy")
    ]
    info = next((table[target] for table in tables if target in table), None)
    try:
        found = propagator.propagate_op_sharding_non_cached(OpSchema(target, tuple(args), kwargs, schema_info=info))
    except Exception:  # no rule, or one that fails on these arguments: torch raises errors of many types
        return None
    needed = list(given)
    if found.needs_redistribute and found.redistribute_schema is not None:
        schema = found.redistribute_schema
        specs = [
            x for x in pytree.tree_leaves((schema.args_schema, schema.kwargs_schema)) if isinstance(x, DTensorSpec)
        ]
        if len(specs) != len(needed):
            return None
        wanted = [_dim(spec) for spec in specs]
        if any(a is not None and a != b for a, b in zip(given, wanted, strict=True)) or _PARTIAL in wanted:
            return None
        needed = wanted
    results: Any = found.output_spec
    outputs = [None if x is None else _dim(x) for x in (results if isinstance(results, (tuple, list)) else [results])]
    return None if _PARTIAL in outputs else (needed, outputs)


_PARTIAL = -1


def _dim(spec: DTensorSpec) -> int | None:
    placement = spec.placements[0]
    if placement.is_replicate():
        return None
    return placement.dim if type(placement) is Shard else _PARTIAL


def _spec(tensor: torch.Tensor, dim: int | None) -> DTensorSpec:
    like = torch.empty([hint(size) for size in tensor.shape], dtype=tensor.dtype, device="meta")
    placement = Replicate() if dim is None else Shard(dim)
    return DTensorSpec(_mesh(), (placement,), TensorMeta(like.shape, like.stride(), like.dtype))


@functools.cache
def _mesh() -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(2), _init_backend=False, _rank=0)
