"""What runs at call time: op schemas, reference kernels, emulated NPU ops, graph capture."""
