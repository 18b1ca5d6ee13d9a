"""Where documents that lie end to end are known to end, read from the ids of their tokens. It waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_POSITION = 2**28


def document_ends(ids: Tensor, positions: Tensor | None, most: int) -> list[int] | None:
    """`most` ends among the B * S tokens, row after row of the batch; behind the last document they repeat B * S.

    ids: integers (B, S) or (S,), equal for tokens of one document of a row. positions: integers that broadcast to them.
    None where a document is not one run of equal ids, where positions do not grow by 1 in one or are larger than
    `LARGEST_POSITION` in size, where `most` ends are too few, and while a graph is captured, which cannot wait.
    """
    is_capturing = getattr(getattr(torch, ids.device.type, None), "is_current_stream_capturing", None)
    if is_capturing is not None and is_capturing():
        return None
    ids = ids if ids.dim() == 2 else ids[None]
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    found = starts.flatten().nonzero().flatten()
    if found.numel() > most:
        return None
    read = [found, ids.flatten()[found].to(torch.int64)]
    if positions is not None:
        positions = positions.to(torch.int64).expand_as(ids)
        steady = (starts[:, 1:] | (positions[:, 1:] - positions[:, :-1] == 1)).all()
        small = ((positions <= LARGEST_POSITION) & (positions >= -LARGEST_POSITION)).all()
        read.append((steady & small).to(torch.int64).expand_as(found))
    first, own, *usual = torch.stack(read).tolist()
    one_run_each = len({(start // ids.size(1), x) for start, x in zip(first, own, strict=True)}) == len(first)
    if not one_run_each or not all(map(all, usual)):
        return None
    ends = [*first[1:], ids.numel()]
    return ends + [ids.numel()] * (most - len(ends))
