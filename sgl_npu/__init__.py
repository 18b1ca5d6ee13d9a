"""Attention on Ascend NPUs for models nobody prepared for it: `torch.compile(model, backend="sgl_npu")`."""

from importlib.metadata import entry_points as _entry_points
from importlib.util import find_spec as _find_spec

import sgl_npu._torch as _torch  # noqa: F401
import sgl_npu.ops as ops
from sgl_npu.compiler.backend import sgl_npu as _sgl_npu
from sgl_npu.compiler.coverage import CoverageError, expect
from sgl_npu.compiler.explain import explain
from sgl_npu.compiler.options import Options, OptionsError, Parallel
from sgl_npu.compiler.report import Report, reports
from sgl_npu.compiler.rewrite import rewrite
from sgl_npu.compiler.sparse_quality import SparseQuality
from sgl_npu.passes.user_match import AttentionPattern, register_matcher
from sgl_npu.runtime.capture.runner import CaptureError, GraphRunner
from sgl_npu.runtime.denoising import denoising_step
from sgl_npu.runtime.npu import ensure_ops as _ensure_ops

__version__ = "0.1.0"
__all__ = [
    "AttentionPattern",
    "CaptureError",
    "CoverageError",
    "GraphRunner",
    "Options",
    "OptionsError",
    "Parallel",
    "Report",
    "SparseQuality",
    "denoising_step",
    "expect",
    "explain",
    "ops",
    "register_matcher",
    "reports",
    "rewrite",
]

# A saved program names the NPU's operators: where torch_npu can never define them, they are there from the start.
if _find_spec("torch_npu") is None:
    _ensure_ops()

# Installed, the backend is an entry point, which torch registers itself, once. From a source tree it is not.
if not _entry_points(group="torch_dynamo_backends", name="sgl_npu"):
    from torch._dynamo import register_backend as _register_backend

    _register_backend(_sgl_npu, name="sgl_npu")
