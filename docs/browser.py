"""A page in headless Chromium, for the tests and the pictures of the report."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium() -> str | None:
    """Where Chromium is, None where it is not installed."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path is not None), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A browser of playwright. Raises RuntimeError where there is no Chromium."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        raise RuntimeError("no Chromium was found: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield found
        finally:
            found.close()


@contextlib.contextmanager
def open_page(path: Path, height: int = 768, theme: str = "light", fragment: str = "") -> Iterator[Any]:
    """The page of a file on a laptop's screen."""
    with browser() as found:
        tab = found.new_page(viewport={"width": 1366, "height": height}, color_scheme=theme)
        tab.goto(path.resolve().as_uri() + fragment)
        yield tab
