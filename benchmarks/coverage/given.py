"""Inputs that a row gives by name where the signature does not say enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.coverage.case import Setting


def given(**makers: Any) -> Callable[[Any, Setting], dict[str, Any]]:
    """Inputs by name: a function of the setting, or a value as it is."""
    return lambda model, setting: {name: maker(setting) if callable(maker) else maker for name, maker in makers.items()}


def floats(*shape: int) -> Callable[[Setting], Tensor]:
    return lambda setting: torch.randn(setting.batch, *shape)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Setting], Tensor]:
    return lambda setting: torch.ones(setting.batch, *shape, dtype=dtype)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Setting], Tensor]:
    return lambda setting: torch.zeros(setting.batch, *shape, dtype=dtype)


def boxes(setting: Setting) -> Tensor:
    """A box of whole coordinates for every token: left, top, right, bottom."""
    return torch.randint(0, 8, (setting.batch, setting.seq, 4)).cumsum(-1)


def unit_boxes(setting: Setting) -> Tensor:
    """A box within the unit square for every token."""
    return torch.rand(setting.batch, setting.seq, 4)


IMAGE = floats(3, 32, 32)
LARGE_IMAGE = floats(3, 64, 64)
PHOTO = floats(3, 128, 128)
VIDEO = floats(4, 3, 32, 32)


def text_and_image() -> Callable[[Any, Setting], dict[str, Any]]:
    from benchmarks.coverage.inputs import tokens

    return given(input_ids=tokens, pixel_values=IMAGE)
