"""Layouts are strings of axis letters; reading, building and normalising shapes walks the letters.

B batch, N heads, S sequence, T tokens of all sequences together, D size of a head, H = N * D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from sgl_npu.runtime.sizes import Size

# torch_npu 2.13.0 meta kernel. "BNSD_BSND" reads BNSD and writes BSND.
FIA_LAYOUTS = (
    *("BSH", "BSND", "BNSD", "TND", "NTD", "NSD"),
    *("BNSD_BSND", "BSH_BNSD", "BSND_BNSD", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD"),
    *("TND_NTD", "NTD_TND"),
)


class AxisSizes(NamedTuple):
    """The sizes of one tensor, whatever its layout. `length` counts T where there is no S."""

    batch: Size
    heads: Size
    length: Size
    dim: Size


def query_axes(layout: str) -> str:
    """Axis letters of the query, key and value of a layout name."""
    return layout.partition("_")[0]


def out_axes(layout: str) -> str:
    """Axis letters of the attention output of a layout name."""
    return layout.rpartition("_")[2]


def read_sizes(axes: str, shape: tuple[Size, ...], heads: int) -> AxisSizes:
    """Sizes of a tensor whose axes are `axes`; `heads` splits H and is otherwise not looked at."""
    size = dict(zip(axes, shape, strict=True))
    return AxisSizes(
        batch=size.get("B", 1),
        heads=size.get("N", heads),
        length=size["S"] if "S" in size else size["T"],
        dim=size["D"] if "D" in size else size["H"] // heads,
    )


def build_shape(axes: str, sizes: AxisSizes) -> tuple[Size, ...]:
    """The shape with axes `axes` that holds `sizes`."""
    batch, heads, length, dim = sizes
    size = {"B": batch, "N": heads, "S": length, "T": length, "D": dim, "H": heads * dim}
    return tuple(size[axis] for axis in axes)


def view_bnsd(tensor: torch.Tensor, axes: str, heads: int) -> torch.Tensor:
    """A (B, N, S, D) view. Packed tokens become one batch entry with S = T."""
    if "H" in axes:
        tensor = tensor.unflatten(-1, (heads, tensor.shape[-1] // heads))
    axes = axes.replace("H", "ND").replace("T", "S")
    if "B" not in axes:
        tensor, axes = tensor.unsqueeze(0), "B" + axes
    return tensor.permute([axes.index(axis) for axis in "BNSD"])


def sequences(axes: str, tensor: torch.Tensor, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """(N, S, D) of every sequence of a TND or BNSD tensor, a view. `lengths` are those of the sequences."""
    for index, (end, length) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
        yield tensor[end - length : end].transpose(0, 1) if axes == "TND" else tensor[index, :, :length]
