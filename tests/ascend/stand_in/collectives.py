"""Collectives for the stand-in: those of the group's CPU backend, gloo or fake, on the stand-in's memory.

HCCL is not there. What torch and torch_npu do around a collective is their own code.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from stand_in.kernels import give_own_kernel
from stand_in.memory import as_cpu, map_leaves, on_npu

# Below `torch.distributed` and functional collectives alike; private names of torch, seen in 2.13.
OPS = (
    "c10d::_allgather_base_", "c10d::allgather_into_tensor_coalesced_", "c10d::_reduce_scatter_base_",
    "c10d::allreduce_", "c10d::alltoall_base_", "c10d::broadcast_",
)  # fmt: skip


# How often each has run.
calls: Counter[str] = Counter()


def install() -> None:
    for name in OPS:
        give_own_kernel(name, _of_cpu)


def _of_cpu(op: torch._ops.OpOverload, *args: Any) -> Any:
    """The op on the same memory as the CPU's; tensors that it returns are its first argument."""
    calls[op.name()] += 1
    result = op(*map_leaves(lambda x: as_cpu(x) if on_npu(x) else x, list(args)))
    return (args[0], *result[1:]) if isinstance(result, tuple) else result
