"""The masks that kernels want whole: a tensor with a row for each query, made for the kernel and nobody else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from sgl_npu.compiler.graph_text import value_text
from sgl_npu.compiler.trace import Trace
from sgl_npu.compiler.trace_graph import at_hand, is_triangle, tensor_bytes

_NAMES = ("atten_mask", "attn_mask", "attn_bias", "pse_shift", "pse")  # of kernels' arguments


def note_kernel_masks(trace: Trace, marked: dict[int, list[fx.Node]]) -> None:
    """Of every site of a graph after the passes: what its kernels get beside what the mask's proof has left."""
    masks = {number: _masks(nodes, trace.site(number).mask_kept) for number, nodes in marked.items()}
    for number, found in masks.items():
        if found:
            own = trace.site(number)
            own.kernel_mask = " + ".join(dict.fromkeys(map(value_text, found)))
            own.kernel_mask_bytes = sum(tensor_bytes(node.meta["val"]) for node in found)
            own.kernel_mask_sites = sum(other == found for other in masks.values())


def _masks(nodes: Iterable[fx.Node], kept: str) -> list[fx.Node]:
    given = (node for kernel in nodes for node in _arguments(kernel))
    return [node for node in dict.fromkeys(given) if _is_whole(node) and value_text(node) not in kept.split(" + ")]


def _arguments(kernel: fx.Node) -> Iterable[fx.Node]:
    if not isinstance(kernel.target, torch._ops.OpOverload):
        return
    names = (argument.name for argument in kernel.target._schema.arguments)
    given = {**dict(zip(names, kernel.args, strict=False)), **kernel.kwargs}
    yield from (x for name in _NAMES if isinstance(x := given.get(name), fx.Node))


def _is_whole(node: fx.Node) -> bool:
    """Whether it has memory for rows and columns both, and is not the triangle that modes of Ascend's ops take."""
    x = node.meta.get("val")
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or is_triangle(x):
        return False
    return all(
        at_hand(size) > 1 and at_hand(step) != 0 for size, step in zip(x.shape[-2:], x.stride()[-2:], strict=True)
    )
