"""Run a program on the stand-in: `python -m stand_in [-n NPUS] [--ge] program.py ...` or `... -m module ...`."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import stand_in


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stand_in", description=__doc__)
    parser.add_argument("-n", type=int, metavar="NPUS", help="number of devices (default 1)")
    parser.add_argument("-m", action="store_true", dest="module", help="the program is a module's name")
    parser.add_argument("--ge", action="store_true", help="let torchair convert to GE graphs without CANN")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    stand_in.start(options.n)
    from stand_in import kernels

    kernels.install()
    if options.ge:
        from stand_in import ge

        ge.offline()
    sys.argv = [options.program, *options.arguments]
    if options.module:
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    else:
        # As Python does for a script.
        sys.path.insert(0, str(Path(options.program).resolve().parent))
        runpy.run_path(options.program, run_name="__main__")


if __name__ == "__main__":
    main()
