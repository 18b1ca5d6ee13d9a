"""`python -m stand_in` runs a program that knows nothing of it on the stand-in."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, torch
from beside_the_script import x
x = x.to("npu")
print(sys.argv[1:], torch.npu.device_count(), (x + x).tolist(), __name__)
"""


BESIDE = "import torch; x = torch.ones(3)"


def run(*arguments, modules=None):
    paths = [str(path) for path in (Path(__file__).parents[1], modules) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-m", "stand_in", *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_script_runs_with_its_arguments(tmp_path):
    (tmp_path / "beside_the_script.py").write_text(BESIDE)
    (tmp_path / "script.py").write_text(PROGRAM)
    printed = run("-n", "3", str(tmp_path / "script.py"), "-n", "7", "--flag")
    assert "['-n', '7', '--flag'] 3 [2.0, 2.0, 2.0] __main__" in printed


def test_a_module_runs_with_its_arguments(tmp_path):
    (tmp_path / "beside_the_script.py").write_text(BESIDE)
    (tmp_path / "program_of_the_test.py").write_text(PROGRAM)
    printed = run("-m", "program_of_the_test", "-m", "x", modules=tmp_path)
    assert "['-m', 'x'] " in printed and "[2.0, 2.0, 2.0] __main__" in printed
