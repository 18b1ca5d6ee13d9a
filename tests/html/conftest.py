"""The report that pages are made of."""

from __future__ import annotations

import pytest
import torch
from html_models import Layers, inputs

import sgl_npu


@pytest.fixture(scope="session")
def explained() -> sgl_npu.Report:
    """A report of three layers: two causal with padding, one with a window."""
    with torch.no_grad():
        return sgl_npu.explain(Layers().eval().bfloat16(), *inputs(), options={"platform": "npu"})
