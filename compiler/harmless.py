"""What is noted for readers of a report may be lacking; it may not cost anybody their model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any


def harmless(function: Callable[..., None]) -> Callable[..., None]:
    """The function, with a warning in the place of an error."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            warnings.warn(
                f"sgl_npu: the report will lack a part ({function.__name__}): {error!r}; the compiled model is not "
                "concerned",
                stacklevel=2,
            )

    return run
