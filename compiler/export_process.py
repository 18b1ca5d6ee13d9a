"""Whether an Ascend compiler can be used here, and a process of its own for it: the two refuse to share one."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from sgl_npu.compiler.export_files import Entry, all_missing, one_line, write_text
from sgl_npu.compiler.inner_ascend import is_installed
from sgl_npu.compiler.own_process import command


def why_not(name: str) -> str:
    """Why the Ascend compiler `name` cannot be used here, with the remedy; empty if it can."""
    if importlib.util.find_spec("torch_npu") is None:
        release = torch.__version__.partition("+")[0]
        return (
            "torch_npu is not installed; pip install torch-npu in the release of your torch "
            f"({release}). No NPU is needed, but the CANN toolkit is: source its set_env.sh"
        )
    if reason := broken():
        return reason
    if not is_installed(name):
        return f"this torch_npu ({version('torch-npu')}) has no {name}; install the newest release for your torch"
    return ""


def broken() -> str:
    """Why the torch_npu that is installed cannot be imported; empty if it can, or if there is none."""
    if importlib.util.find_spec("torch_npu") is None:
        return ""
    try:
        importlib.import_module("torch_npu")
    except Exception as error:
        return (
            f"torch_npu is installed, but its import fails: {one_line(error)}. Source set_env.sh of the CANN toolkit; "
            "without CANN, from a checkout of sgl_npu: make test-npu, then "
            "PYTHONPATH=tests/ascend .venv-npu/bin/python -m stand_in --ge -m sgl_npu export ..."
        )
    return ""


def run_part(request: dict[str, Any], part: str) -> list[Entry]:
    """Do one part in another process. One that ends without an answer leaves what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps({"part": part, "request": request}), encoding="utf-8")
        process = subprocess.run(
            command("export-part", str(asked), str(answered)), capture_output=True, text=True, errors="replace"
        )
        if answered.is_file():
            return [Entry(**row) for row in json.loads(answered.read_text(encoding="utf-8"))]
    path = Path(request["out"]) / f"{part}_error.txt"
    printed = process.stdout + process.stderr
    write_text(printed, path)
    log = Entry(path.name, "what the process printed", part, size=path.stat().st_size)
    last = "".join(printed.strip().splitlines()[-1:])
    return [*all_missing(part, f"{_ending(process.returncode, part)}: {last}"), log]


def _ending(code: int, part: str) -> str:
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"the process of {part} ended {ended}"


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
