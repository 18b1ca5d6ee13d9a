"""Which step of a denoising loop is running: compiled models read it to choose between their dense and sparse graph."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from contextvars import ContextVar

_step: ContextVar[int | None] = ContextVar("sgl_npu_denoising_step", default=None)


def current_step() -> int | None:
    """The step that was announced last in this thread or task; None if none was."""
    return _step.get()


def announce_step(step: int) -> None:
    """Say which step runs from now on, the first being 0. Raises ValueError for what is no step."""
    _step.set(_checked(step))


@contextlib.contextmanager
def denoising_step(step: int) -> Iterator[None]:
    """Context in which compiled models run as in that step of the loop, the first being 0.

    Raises ValueError for what is no step.
    """
    token = _step.set(_checked(step))
    try:
        yield
    finally:
        _step.reset(token)


def _checked(step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 0:
        raise ValueError(f"denoising_step({step!r}): a step is an int from 0 on; pass the index of the loop")
    return int(step)
