"""A stand-in NPU: the real torch_npu wheel on a machine without NPU and CANN.

`start()` loads the libraries that torch_npu misses, before torch is imported; `kernels.install()` then gives the
device kernels, which run on the CPU. Whatever was not given a kernel raises, as nothing here makes numbers up.
"""

from __future__ import annotations

import os
import sys

from stand_in import build

__all__ = ["start"]

SETTINGS = {
    # Copies run on the calling thread: a kernel in Python reads what was copied just before.
    "TASK_QUEUE_ENABLE": "0",
    # `import torch` imports torch_npu: sgl_npu, which looks for its operators, always comes later.
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
}
COUNT = "STAND_IN_NPUS"

_started = False


def start(devices: int | None = None) -> None:
    """Make the next `import torch` find this many NPUs (default: the environment's STAND_IN_NPUS, else one)."""
    global _started
    count = devices if devices is not None else int(os.environ.get(COUNT, "1"))
    if count < 1:
        raise ValueError(f"devices = {count}: a stand-in has at least one NPU; torch_npu aborts without any")
    if _started:
        if str(count) != os.environ[COUNT]:
            raise RuntimeError(f"stand-in NPU: started with {os.environ[COUNT]} devices, now asked for {count}")
        return
    if early := [name for name in ("torch", "torch_npu") if name in sys.modules]:
        raise RuntimeError(f"stand-in NPU: {early[0]} is already imported; call stand_in.start() before it")
    os.environ.update(SETTINGS, **{COUNT: str(count)})
    build.load()
    _started = True
