"""The files of the page that are no code: templates, style and script."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2


def rendered(name: str, **values: Any) -> str:
    """A template with its values. What they hold is text, unless it is Markup; a value that is missing is an error."""
    return _environment().get_template(name).render(**values)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(file_text)
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def file_text(name: str) -> str:
    return files("sgl_npu.compiler.html").joinpath(name).read_text(encoding="utf-8")
