"""What a command shows on stderr while it works: how many of its steps are done, and for how long it has run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Step = Callable[[str], None]  # begins the next step, named by the text


def silent(text: str) -> None:
    """A Step for callers that show nothing."""


@contextmanager
def steps(total: int, console: Console | None = None) -> Iterator[Step]:
    """A bar of `total` steps, gone when the body ends. Shown on a terminal only."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    shown = Progress(
        *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        console=console,
        transient=True,
        refresh_per_second=4,  # drawn by the process that may be timing something
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file or a pipe stays there
    )
    with shown as progress:
        task = progress.add_task("", total=total)
        begun = 0

        def step(text: str) -> None:
            nonlocal begun
            progress.update(task, description=escape(text), completed=begun, refresh=True)
            begun += 1

        yield step
