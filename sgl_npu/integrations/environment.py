"""Options for processes that somebody else starts: the JSON object in `SGL_NPU_OPTIONS`."""

from __future__ import annotations

import json
import os
from typing import Any

from sgl_npu.compiler.options import OptionsError, parse_options

VARIABLE = "SGL_NPU_OPTIONS"


def environment_options() -> dict[str, Any]:
    """What the variable says, empty where it is not set. Raises OptionsError where that is no JSON or no options."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionsError(f'{VARIABLE} = {text!r}: {error}; expected JSON, as {{"inner": "eager"}}') from None
    try:
        parse_options(options)
    except OptionsError as error:
        raise OptionsError(f"{VARIABLE}: {error}") from None
    return options
