"""What `sgl-npu explain TARGET` means: a factory's model, or a transformers config's without memory."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
# Of a Setting, what a factory may take as arguments.
SIZES = ("seq", "batch", "dtype", "layers")


class TargetError(ValueError):
    """A target or setting that cannot be used; one line that names it and the remedy."""


@dataclass(frozen=True)
class Setting:
    """The sizes under which a config is explained; `memory` is whether its weights are made, at random.

    `asked` are the names of those that the user gave, and that a factory must not leave out.
    """

    seq: int = 4096
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    layers: int | None = None
    memory: bool = False
    asked: Collection[str] = ()


@dataclass(frozen=True)
class Target:
    """A call to explain; `note` says how large the model is, `mode` is what its tensors live in."""

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    note: str
    mode: AbstractContextManager = field(default_factory=nullcontext)


def parse_dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise TargetError(f"--dtype {text}: should be one of {', '.join(DTYPES)}")
    return DTYPES[text]


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """key=value pairs as an options dict. Values are JSON where they parse as it; `parallel.ring=2` nests."""
    options: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise TargetError(f"--option {item}: should be key=value, such as --option attention=sdpa")
        *outer, last = name.split(".")
        level = options
        for part in outer:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise TargetError(f"--option {item}: {part!r} was given a value of its own before")
        level[last] = _json_or_text(text)
    return options


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def load_target(text: str, setting: Setting) -> Target:
    """A directory, a .json file or `package.module:factory`."""
    path = Path(text)
    if path.is_dir() or text.endswith(".json"):
        return _from_config(path, setting)
    if ":" in text:
        return _from_factory(text, setting)
    raise TargetError(
        f"{text}: neither package.module:factory, nor a directory with a config.json, nor a config.json; give "
        f"the path of a downloaded model (nothing is downloaded here), or {text}:FUNCTION for one of your own"
    )


def _from_factory(text: str, setting: Setting) -> Target:
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise TargetError(f"{text}: {error}; run from the folder of the module, or install it") from None
    factory = getattr(module, name, None)
    if not callable(factory):
        raise TargetError(f"{text}: {module_name} has no function {name!r}{_others(module)}")
    sizes = _sizes_for(text, factory, setting)
    try:
        made = factory(**sizes)
    except Exception as error:
        raise TargetError(f"{text}: the factory raised {type(error).__name__}: {error}") from error
    parts = made if isinstance(made, tuple) else (made,)
    model, *rest = parts
    kwargs = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    if not callable(model) or len(rest) > 1 or not all(isinstance(args, (tuple, list)) for args in rest):
        raise TargetError(
            f"{text}: the factory should return model, (model, args), (model, kwargs) or (model, args, kwargs), with "
            f"args a tuple and kwargs a dict, not ({', '.join(type(part).__name__ for part in parts)})"
        )
    return Target(model, tuple(*rest), kwargs, f"{text}: {_size_text(model)}")


def _others(module: Any) -> str:
    """What the user may have meant."""
    own = [name for name, x in vars(module).items() if callable(x) and getattr(x, "__module__", "") == module.__name__]
    return f"; it has {', '.join(own[:8])}" if own else ""


def _sizes_for(text: str, factory: Callable, setting: Setting) -> dict[str, Any]:
    """The sizes that the factory has arguments for."""
    taken: dict[str, inspect.Parameter] = {}
    with suppress(ValueError):  # a class written in C
        taken.update(inspect.signature(factory).parameters)
    for name in SIZES:
        if name in setting.asked and name not in taken:
            raise TargetError(
                f"--{name}: {text} takes no argument {name!r}, so this would change nothing; give the function one, "
                "or leave the option away"
            )
    # An argument with a default of its own keeps it, unless the user says otherwise.
    return {
        name: getattr(setting, name)
        for name in SIZES
        if name in taken and (name in setting.asked or taken[name].default is inspect.Parameter.empty)
    }


@contextmanager
def telling_call_errors(text: str, target: Target) -> Iterator[None]:
    """Context in which an error that the model raises without any compiler is one line; others stay as they are."""
    try:
        yield
    except Exception as error:
        try:
            with torch.no_grad(), target.mode:
                target.model(*target.args, **target.kwargs)
        except Exception as own:
            first = next(iter(str(own).strip().splitlines()), "")
            raise TargetError(
                f"{text}: calling the model failed, also without a compiler: {type(own).__name__}: {first}; a factory "
                "returns the model with what it is called with: (model, args), (model, kwargs) or (model, args, kwargs)"
            ) from error
        raise


def _from_config(path: Path, setting: Setting) -> Target:
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError:
        raise TargetError(f"{path}: a config needs transformers: pip install transformers") from None
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise TargetError(f"{file}: no such file; give the folder of a downloaded model")
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise TargetError(f"{file}: not a config that transformers knows: {str(error).splitlines()[0]}") from None
    text_config = config.get_text_config()
    if setting.layers is not None:
        _cut_layers(text_config, setting.layers)
    mode: AbstractContextManager = nullcontext() if setting.memory else FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
        except ValueError:
            model = AutoModel.from_config(config, dtype=setting.dtype)
        tokens = torch.zeros((setting.batch, setting.seq), dtype=torch.long)
    note = (
        f"{type(model).__name__}, {_size_text(model)}, {text_config.num_hidden_layers} layers, "
        f"batch {setting.batch}, {setting.seq} tokens"
    )
    return Target(model.eval(), (), {"input_ids": tokens}, note, mode)


def _cut_layers(config: Any, layers: int) -> None:
    """Keep the first layers; lists that have an entry per layer are cut with them."""
    depth = config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise TargetError(f"--layers {layers}: the config has {depth} layers; give 1 to {depth}")
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


def _size_text(model: Callable) -> str:
    if not isinstance(model, nn.Module):
        return "a function"
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f} M parameters"
