"""torch_npu without CANN: nothing can be imported, and the error says what to do."""

import os
import subprocess
import sys

IMPORT = [sys.executable, "-c", "import sgl_npu; print(sgl_npu.__version__)"]


def test_without_cann_importing_says_what_to_do():
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    result = subprocess.run(IMPORT, env=environment, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: torch_npu is installed and cannot be loaded (lib")
    assert "set_env.sh" in last and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in last


def test_its_remedy_works():
    result = subprocess.run(
        IMPORT, env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
