from sgl_npu.runtime.npu import ensure_ops

# Test modules name the operators while they are collected.
assert ensure_ops() == "emulated"
