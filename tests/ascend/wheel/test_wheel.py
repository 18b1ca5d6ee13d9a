"""What is built is derived from the installed wheel, whatever it asks for, once for all processes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# A release that calls a function that no runtime of ours has, and is linked against a library that nobody knows.
NEW_RELEASE = """
    int aclrtGetDevice(int *);
    int aclNewInThisRelease(void);
    const char *aclGetRecentErrMsg(void);
    int known(void) { int device = 7; return aclrtGetDevice(&device) + device; }
    int unknown(void) { return aclNewInThisRelease(); }
    const char *why(void) { return aclGetRecentErrMsg(); }
"""


def start(program, *arguments):
    """Run a program in a process of its own, where nothing is loaded yet."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )


def printed(process):
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return lines


@pytest.fixture
def new_release(tmp_path):
    absent = [tmp_path / name for name in ("libascendcl.so", "libnew_in_this_release.so")]
    wheel = tmp_path / "torch_npu.so"
    for source, target, linked in (*(("", library, ()) for library in absent), (NEW_RELEASE, wheel, absent)):
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", "-Wl,--no-as-needed", *map(str, linked)]
        subprocess.run([*command, f"-Wl,-soname,{target.name}", "-o", str(target)], input=source, text=True, check=True)
    for library in absent:
        library.unlink()
    return wheel


def test_a_release_with_a_new_library_and_a_new_function_loads(new_release, tmp_path):
    program = """
        import ctypes, sys
        from pathlib import Path
        from stand_in import build
        from stand_in.wheel import Wheel
        wheel = Wheel((Path(sys.argv[1]),), ())
        print(*wheel.libraries)
        print(*wheel.symbols)
        for library in build.built(wheel, Path(sys.argv[2])):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        release = ctypes.CDLL(sys.argv[1])
        release.why.restype = ctypes.c_char_p
        print(release.known(), release.unknown(), release.why().decode())
    """
    assert printed(start(program, new_release, tmp_path / "cache")) == [
        "libascendcl.so libnew_in_this_release.so",
        "aclGetRecentErrMsg aclNewInThisRelease aclrtGetDevice",
        "0 500000 stand-in NPU: aclNewInThisRelease is not there, as no kernel is",
    ]


def test_every_function_that_the_installed_wheel_misses_is_built():
    program = """
        import ctypes
        from stand_in import build
        from stand_in.wheel import Wheel
        missing = Wheel.installed().symbols
        build.load()
        process = ctypes.CDLL(None)
        print(len(missing) > 0, [name for name in missing if not hasattr(process, name)])
    """
    assert printed(start(program)) == ["True []"]


def test_processes_that_start_together_build_once_and_load_the_same(tmp_path):
    program = """
        import sys
        from pathlib import Path
        from stand_in import build
        from stand_in.wheel import Wheel
        print(*build.built(Wheel.installed(), Path(sys.argv[1])), sep="\\n")
    """
    first, *others = map(printed, [start(program, tmp_path) for _ in range(3)])
    assert len(first) > 1 and all(other == first for other in others)
    (folder,) = tmp_path.iterdir()
    assert sorted(map(str, folder.iterdir())) == sorted(first)
