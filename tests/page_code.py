"""The code that stands in pages of docs/."""

from __future__ import annotations

import re
from pathlib import Path


def code_blocks(page: Path, language: str = "python") -> list[str]:
    """What stands between fences of that language, from top to bottom."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
