"""The collectives of sequence parallelism, each started by one call and waited for by another.

A collective returns at once; `wait` ends it. What is computed between the two overlaps with it. Groups are given by
their names, and ranks are counted within the group.

    all_to_all   (P, ...) -> (P, ...): row d goes to rank d, row s of the result is from rank s
    all_gather   (n, ...) -> (P n, ...): everybody's rows, in the order of the ranks
    ring_shift   x -> the x of rank (r - step) mod P

`sgl_npu::ring_shift` reads its rank when it runs, so its node is the same in the graph of every rank. Torch's own
all-to-all has the ranks in its arguments: `open_shift` is that form, for the compilers that should see it. Inductor is
one: it may reuse the memory of an op's input after the op, and knows of torch's own collectives alone that they read
on until they are waited for.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sgl_npu.runtime.sequence import Axis
from sgl_npu.runtime.sizes import Size

_c10d = torch.ops._c10d_functional

SHIFT_NAME = "sgl_npu::ring_shift"

torch.library.define(
    SHIFT_NAME,
    "(Tensor x, int size, str group, int step=1) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides),
)


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Start to exchange the rows of `x`, one per rank of the axis."""
    rows = [1] * axis.size
    return _c10d.all_to_all_single.default(x.contiguous(), rows, rows, axis.group)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Start to gather the rows of `x` of every rank of the axis."""
    return _c10d.all_gather_into_tensor.default(x.contiguous(), axis.size, axis.group)


def ring_shift(x: Tensor, axis: Axis, step: int = 1) -> Tensor:
    """Start to pass `x` to the rank that is `step` ahead on the axis; the result is from the one `step` behind."""
    return torch.ops.sgl_npu.ring_shift.default(x.contiguous(), axis.size, axis.group, step)


def wait(x: Tensor) -> Tensor:
    """The result of a collective, once it is there."""
    return _c10d.wait_tensor.default(x)


def open_shift(x: Tensor, size: int, rank_in_group: int, group: str, step: int = 1) -> Tensor:
    """`ring_shift` as torch's all-to-all, in which all counts but one are zero. Still to be waited for."""
    count: Size = x.numel()
    sent = [count if rank == (rank_in_group + step) % size else 0 for rank in range(size)]
    received = [count if rank == (rank_in_group - step) % size else 0 for rank in range(size)]
    return _c10d.all_to_all_single.default(x.reshape(count), received, sent, group).view(x.shape)


def rank_in(group: str) -> int:
    """This process's rank within the group of that name, which need not be its rank in the world."""
    # No public function finds a group by its name (torch 2.13).
    return dist.distributed_c10d._resolve_process_group(group).rank()  # type: ignore[arg-type]


@torch.library.impl(SHIFT_NAME, "CompositeExplicitAutograd")
def _shift(x: Tensor, size: int, group: str, step: int = 1) -> Tensor:
    return open_shift(x.contiguous(), size, rank_in(group), group, step)


@torch.library.register_fake(SHIFT_NAME)
def _shift_fake(x: Tensor, size: int, group: str, step: int = 1) -> Tensor:
    return x.new_empty(x.shape)
