"""Numbers as options take them: Python's, NumPy's and whatever else says that it is one, but no bool."""

from __future__ import annotations

import numbers
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _whole(value: Any) -> int:
    if not is_whole(value):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return int(value)


def _real(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    if type(value) in (int, float):
        return value  # errors show it as it was written
    return float(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Real = Annotated[float, BeforeValidator(_real)]
