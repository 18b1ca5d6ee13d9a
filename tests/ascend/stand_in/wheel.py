"""What the installed torch_npu wheel expects of CANN: libraries that are not there, symbols that nobody defines.

Everything is read from the ELF files of the installed wheels, so another release needs no new list.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """The shared objects of torch_npu, and those of torch, which they are linked against."""

    torch_npu: tuple[Path, ...]
    torch: tuple[Path, ...]

    @classmethod
    def installed(cls) -> Wheel:
        """The wheels of this environment, found without importing them. Raises RuntimeError where there are none."""
        return cls(
            tuple(sorted(_folder("torch_npu").rglob("*.so*"))), tuple(sorted((_folder("torch") / "lib").glob("*.so*")))
        )

    @property
    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Differs between any two installations that may need different libraries."""
        files = ((path, path.stat()) for path in (*self.torch_npu, *self.torch))
        return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files]

    @cached_property
    def libraries(self) -> list[str]:
        """Names of the libraries that torch_npu needs and that neither the wheels nor the system have."""
        present = {path.name for path in (*self.torch_npu, *self.torch)}
        needed = {name for path in self.torch_npu for name in _needed(path)}
        return sorted(name for name in needed - present if not _loads(name))

    @cached_property
    def symbols(self) -> list[str]:
        """Names of the functions that torch_npu calls and that nobody here defines."""
        # Symbols with a version, name@VERSION, belong to the C and C++ libraries of the system.
        wanted = {name for path in self.torch_npu for kind, name in _symbols(path, "--undefined-only") if kind == "U"}
        defined = {name for path in (*self.torch_npu, *self.torch) for _, name in _symbols(path, "--defined-only")}
        unversioned = {name for name in wanted if "@" not in name} - {name.partition("@")[0] for name in defined}
        process = ctypes.CDLL(None)
        missing = sorted(name for name in unversioned if not hasattr(process, name))
        if data := [name for name in missing if name.startswith(("_ZTV", "_ZTI"))]:
            raise RuntimeError(f"stand-in NPU: torch_npu needs C++ classes, not only functions: {', '.join(data)}")
        return missing


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(
            f"stand-in NPU: {package} is not installed; `make test-npu` makes an environment that has it"
        )
    return Path(spec.origin).parent


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _needed(path: Path) -> Iterator[str]:
    for line in _run("readelf", "-d", str(path)):
        if "(NEEDED)" in line:
            yield line.rpartition("[")[2].rstrip("]")


def _symbols(path: Path, which: str) -> Iterator[tuple[str, str]]:
    """Kind ("U" undefined, "T" function, ...) and name of the dynamic symbols."""
    for line in _run("nm", "-D", which, str(path)):
        *_, kind, name = line.split()
        yield kind, name


def _run(*command: str) -> list[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in result.stdout.splitlines() if line.strip()]
