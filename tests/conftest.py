"""What one test may not leave behind for the next, and what need not be done after each of many compilations."""

from __future__ import annotations

import gc
import sys

import pytest


def pytest_collection_finish():
    """Of the time to compile, a quarter went into looking for garbage among the objects of imported modules."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


def pytest_runtestloop():
    """Dynamo ends a compilation by collecting garbage, and by timing the guards for a log, with the caches flushed.

    That is 7 % of the time of the tests. Both names are private, seen in torch 2.13.
    """
    guards = sys.modules.get("torch._dynamo.guards")
    config = sys.modules.get("torch._dynamo.config")
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0
    if hasattr(config, "run_gc_after_compile"):
        config.run_gc_after_compile = False


@pytest.fixture(autouse=True)
def no_announced_step():
    """A denoising step that a test announces without a context, as pipelines do, ends with the test."""
    yield
    # Not imported here: the tests on the stand-in NPU load it before torch.
    denoising = sys.modules.get("sgl_npu.runtime.denoising")
    if denoising is not None:
        denoising._step.set(None)
