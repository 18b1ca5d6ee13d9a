"""What one test may not leave behind for the next, and how seldom all of them look for garbage."""

from __future__ import annotations

import gc
import sys

import pytest


def pytest_collection_finish():
    """Of the time to compile, a quarter went into looking for garbage among the objects of imported modules."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


@pytest.fixture(autouse=True)
def no_announced_step():
    """A denoising step that a test announces without a context, as pipelines do, ends with the test."""
    yield
    # Not imported here: the tests on the stand-in NPU load it before torch.
    denoising = sys.modules.get("sgl_npu.runtime.denoising")
    if denoising is not None:
        denoising._step.set(None)
