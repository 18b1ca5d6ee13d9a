"""What one test may not leave behind for the next."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def no_announced_step():
    """A denoising step that a test announces without a context, as pipelines do, ends with the test."""
    yield
    # Not imported here: the tests on the stand-in NPU load it before torch.
    denoising = sys.modules.get("sgl_npu.runtime.denoising")
    if denoising is not None:
        denoising._step.set(None)
