"""torch, or in words why it cannot be imported where torch_npu is installed: torch loads that, and that needs CANN."""

try:
    import torch  # noqa: F401
except RuntimeError as error:
    if "torch_npu" not in str(error):
        raise
    raise ImportError(
        f"torch_npu is installed and cannot be loaded ({error.__cause__ or error}). On an Ascend machine: source "
        "CANN's set_env.sh in this shell, or install the CANN toolkit. Without an NPU: set "
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0, and NPU ops are emulated; or uninstall torch-npu"
    ) from error
