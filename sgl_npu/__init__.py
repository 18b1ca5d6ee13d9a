"""Attention on Ascend NPUs for models nobody prepared for it: `torch.compile(model, backend="sgl_npu")`."""

from importlib.metadata import entry_points as _entry_points

from sgl_npu.compiler.backend import sgl_npu as _sgl_npu
from sgl_npu.compiler.coverage import CoverageError, expect
from sgl_npu.compiler.explain import explain
from sgl_npu.compiler.options import Options, OptionsError, Parallel
from sgl_npu.compiler.report import Report, reports

__version__ = "0.1.0"
__all__ = ["CoverageError", "Options", "OptionsError", "Parallel", "Report", "expect", "explain", "reports"]

# Installed, the backend is an entry point, which torch registers itself, once. From a source tree it is not.
if not _entry_points(group="torch_dynamo_backends", name="sgl_npu"):
    from torch._dynamo import register_backend as _register_backend

    _register_backend(_sgl_npu, name="sgl_npu")
