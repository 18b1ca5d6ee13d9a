"""Another process of this program, started as this one was: the same interpreter, launcher and environment."""

from __future__ import annotations

import sys

# Where this process is not the command itself, as in a test: the command as a module.
_start = ["-m", "sgl_npu"]
_arguments: list[str] = []


def remember_start() -> None:
    """Take from Python's own arguments what stands before those of the command. Called by the command only."""
    global _start, _arguments
    _arguments = own = sys.argv[1:]
    given = sys.orig_argv
    if own and given[-len(own) :] == own:
        _start = given[1 : -len(own)]


def command(*arguments: str) -> list[str]:
    """What starts the command with these arguments in a process of its own."""
    return [sys.executable, *_start, *arguments]


def arguments() -> list[str]:
    """The arguments of the command; empty where this process is not the command."""
    return list(_arguments)
