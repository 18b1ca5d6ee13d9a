"""torch_npu allows one of its two compilers in a process; the one that comes second is refused by a clear error."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch, sgl_npu

for inner, settings in (("npugraph_ex", {"force_eager": True}), ("torchair", {"debug.run_eagerly": True})):
    try:
        run = torch.compile(torch.sin, backend="sgl_npu", options={"inner": inner, "inner_options": settings})
        print(inner, run(torch.zeros(1, device="npu")).tolist())
    except sgl_npu.OptionsError as error:
        print(str(error).splitlines()[0])
    torch._dynamo.reset()
"""


def test_the_other_compiler_is_refused(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, "-m", "stand_in", "--ge", str(tmp_path / "program.py")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    # torch_npu prints too.
    printed = [line for line in result.stdout.splitlines() if line.startswith(("npugraph_ex ", "torchair ", "inner"))]
    assert printed == [
        "npugraph_ex [0.0]",
        "inner = 'torchair': this process has compiled with Ascend's other compiler, and torch_npu allows one of "
        "npugraph_ex and torchair in a process; use the same inner everywhere, or another process",
    ], result.stderr
