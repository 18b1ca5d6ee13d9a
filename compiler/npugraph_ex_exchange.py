"""The all-to-all of npugraph_ex, which is right for messages of one dimension alone.

Its kernel (torch_npu 2.13.0, `npu_define::all_to_all_single_npu`) is given the counts of elements and takes them for
counts of rows. Of a flat message both are the same.

before: _c10d_functional.all_to_all_single(x, received, sent, group)       rows
after:  the compiler's own decomposition of it on x.flatten(), elements, then viewed as rows again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_npu.runtime.sizes import Size

EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default


def flat_exchange(table: Mapping[Any, Callable]) -> dict[Any, Callable]:
    """The table with messages made flat before its own decomposition of an all-to-all, where it has one."""
    own = table.get(EXCHANGE)
    if own is None:
        return dict(table)

    def exchange(x: Tensor, received: Sequence[Size], sent: Sequence[Size], group: Any) -> Tensor:
        if x.dim() == 1:
            return own(x, received, sent, group)
        row = 1
        for size in x.shape[1:]:
            row = row * size
        counts = ([count * row for count in splits] for splits in (received, sent))
        return own(x.reshape(x.numel()), *counts, group).view(sum(received), *x.shape[1:])

    return {**table, EXCHANGE: exchange}
