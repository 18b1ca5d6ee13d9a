"""Which axes of a tensor are features: followed from projections through views, copies and elementwise ops.

A storage keeps the strides of the axes it was made with and what each of them is; an axis of a view is what the axis
with the largest stride not above its own is. Products of tensors nobody knows anything about count as attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

FEATURE, POSITION, UNKNOWN = "feature", "position", ""
PROJECTIONS = {"linear", "mm", "addmm"}
CONVOLUTIONS = {"convolution", "_convolution", "mkldnn_convolution"}

Labels = tuple[str, ...]


class FeatureAxes:
    def __init__(self) -> None:
        self._axes: dict[int, list[tuple[int, str]]] = {}
        self._alive: list[Any] = []

    def see(self, name: str, inputs: list[Tensor], outputs: list[Tensor], projects: bool) -> None:
        """Take note of one op. `projects`: whether one of its inputs is a parameter."""
        for out in outputs:
            if _key(out) in self._axes or any(_key(x) == _key(out) for x in inputs):
                continue
            if name in PROJECTIONS and projects:
                labels = (POSITION,) * (out.dim() - 1) + (FEATURE,)
            elif name in CONVOLUTIONS:
                labels = (POSITION, FEATURE) + (POSITION,) * (out.dim() - 2)
            else:
                labels = next((self.labels(x) for x in inputs if self._same_axes(name, x, out)), ())
            if any(labels):
                self._remember(out, labels)

    def labels(self, tensor: Tensor) -> Labels:
        """What each axis is; axes of size 1 are nothing."""
        axes = self._axes.get(_key(tensor))
        if axes is None:
            return (UNKNOWN,) * tensor.dim()
        return tuple(
            next((label for step, label in axes if step <= stride), UNKNOWN) if size > 1 and stride else UNKNOWN
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )

    def sums_over_features(self, left: Tensor, right: Tensor) -> bool:
        """Whether the product of two matrices sums over features, as far as that is known of either."""
        found = {self.labels(left)[-1], self.labels(right)[-2]} - {UNKNOWN}
        return found != {POSITION}

    def _same_axes(self, name: str, x: Tensor, out: Tensor) -> bool:
        if _key(x) not in self._axes or x.dim() != out.dim():
            return False
        return x.shape == out.shape or name in ("cat", "stack", "add", "mul")

    def _remember(self, tensor: Tensor, labels: Labels) -> None:
        axes = [
            (stride, label)
            for stride, label, size in zip(tensor.stride(), labels, tensor.shape, strict=True)
            if size > 1
        ]
        self._alive.append(tensor.untyped_storage())
        self._axes[_key(tensor)] = sorted(axes, reverse=True)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
