"""Loads the stand-in NPU before any test module imports torch. Needs the environment of `make test-npu`."""

import stand_in

stand_in.start(devices=2)

from stand_in import kernels  # noqa: E402

kernels.install()
