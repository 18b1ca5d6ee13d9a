"""The tables of options.md, made from the fields of the options: `python -m docs.options` writes them into the page."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from benchmarks.readme import Table
from docs.tables import filled
from sgl_npu import Options, Parallel
from sgl_npu.compiler.options import SparseConfig

PAGE = Path(__file__).with_name("options.md")
_LIMITS = {"ge": "at least", "gt": "above", "lt": "below"}


def fields(model: type[BaseModel]) -> Table:
    """A row per field: name, what it takes, default, meaning."""
    rows = [["option", "values", "default", "meaning"]]
    for name, info in model.model_fields.items():
        rows.append([f"`{name}`", _values(info.annotation, info.metadata), _default(info), info.description or ""])
    return rows


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "`{}`"
    return f'`"{info.default}"`' if isinstance(info.default, str) else f"`{info.default}`"


def _values(annotation: Any, rules: list[Any]) -> str:
    """What a field takes: the words of a Literal, or its type and limits."""
    limits = [f"{sign} {getattr(rule, key)}" for rule in rules for key, sign in _LIMITS.items() if hasattr(rule, key)]
    return ", ".join([_type(annotation), *limits])


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    inner = [x for x in get_args(annotation) if x is not type(None)]
    if get_origin(annotation) is Literal:
        return ", ".join(f'`"{word}"`' for word in inner)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_type, inner))
    if get_origin(annotation) is tuple:
        return f"{_type(inner[0])}, one or more" if inner[-1] is ... else f"{len(inner)} of {_type(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "dict" if annotation is SparseConfig else f"`{annotation.__name__}`, dict"
    return f"`{getattr(get_origin(annotation) or annotation, '__name__', annotation)}`"


TABLES = {
    "options": lambda: fields(Options),
    "attention_config": lambda: fields(SparseConfig),
    "parallel": lambda: fields(Parallel),
}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE, TABLES))
