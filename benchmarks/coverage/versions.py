"""With what a run was made."""

from __future__ import annotations

import datetime
import importlib.metadata


def versions() -> str:
    found = []
    for name in ("torch", "transformers", "diffusers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"{datetime.date.today()}, {', '.join(found)}"
