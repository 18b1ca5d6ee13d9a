"""Builds the libraries that torch_npu misses, once per installed wheel, and loads them into this process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from stand_in.wheel import Wheel

RUNTIME = Path(__file__).with_name("runtime.c")
CACHE = Path(__file__).parents[3] / "build" / "stand_in"
TOOLS = ("gcc", "nm", "readelf")
# All functions are here. The others only depend on it: looking a name up in any of them finds it.
MAIN = "libascendcl.so"


def load() -> list[Path]:
    """Load the libraries for everyone, building them first where needed. Returns their paths."""
    libraries = built(Wheel.installed(), CACHE)
    for library in libraries:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return libraries


def built(wheel: Wheel, cache: Path) -> list[Path]:
    """Paths of the wheel's libraries, the one with the functions first; built if they are not in the cache."""
    sources = [path.read_text() for path in (RUNTIME, Path(__file__))]
    folder = cache / hashlib.sha256(repr((wheel.fingerprint, sources)).encode()).hexdigest()[:16]
    if not folder.exists():
        _build(wheel, folder)
    return sorted(folder.glob("*.so*"), key=lambda path: path.name != MAIN)


def _build(wheel: Wheel, folder: Path) -> None:
    """Build in a folder beside and rename it, so that processes that start together cannot disturb each other."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise RuntimeError(f"stand-in NPU: {', '.join(missing)} not found; install gcc and binutils")
    if MAIN not in wheel.libraries:
        raise RuntimeError(f"stand-in NPU: {MAIN} is on this machine already: use its NPU, or unset LD_LIBRARY_PATH")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        draft = Path(scratch) / "libraries"
        draft.mkdir()
        main = draft / MAIN
        _compile(RUNTIME.read_text() + _generated(wheel.symbols), main)
        for name in wheel.libraries:
            if name != MAIN:
                _compile("", draft / name, "-Wl,--no-as-needed", str(main))
        try:
            draft.rename(folder)
        except OSError:
            # Another process was faster.
            if not folder.exists():
                raise


def _generated(symbols: list[str]) -> str:
    """A failing function for every symbol that the runtime has no body for."""
    written = _defined_by(RUNTIME)
    return "\n".join(
        f'void {name}(void) {{ stand_in_abort("{name}"); }}'
        if name.startswith("_Z")
        else f'int {name}(void) {{ return stand_in_absent("{name}"); }}'
        for name in symbols
        if name not in written
    )


def _defined_by(source: Path) -> set[str]:
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "runtime.so"
        _compile(source.read_text(), library)
        listing = subprocess.run(
            ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
        ).stdout
    return {line.split()[-1] for line in listing.splitlines()}


def _compile(source: str, library: Path, *linked: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-x", "none", *linked]
    command += [f"-Wl,-soname,{library.name}", "-o", str(library)]
    result = subprocess.run(command, input=source, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if result.returncode:
        raise RuntimeError(f"stand-in NPU: gcc could not build {library.name}:\n{result.stderr}")
