"""Plain inputs for a transformers model: from the names of its forward's parameters and the sizes of its config."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from benchmarks.coverage.case import Setting

FIRST_TOKEN, LAST_TOKEN = 5, 100
WAVE, FRAMES, HISTORY = 1600, 64, 64


def tokens(setting: Setting, length: int | None = None) -> torch.Tensor:
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (setting.batch, setting.seq if length is None else length))


def padding_mask(setting: Setting, length: int, left: bool) -> torch.Tensor:
    """Ones; the last sequence has a quarter of padding."""
    mask = torch.ones(setting.batch, length, dtype=torch.long)
    quarter = length // 4
    if left:
        mask[-1, :quarter] = 0
    else:
        mask[-1, length - quarter :] = 0
    return mask


def pixels(setting: Setting, config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    return torch.randn(setting.batch, getattr(config, "num_channels", None) or 3, height, width)


def packed_patches(model: torch.nn.Module, setting: Setting) -> dict[str, Any]:
    """Images of 8 x 8 patches each, flattened and put one after the other, as the Qwen-VL family wants them."""
    names, side = inspect.signature(model.forward).parameters, 8
    first = next(
        layer for layer in model.modules() if isinstance(layer, (torch.nn.Conv3d, torch.nn.Conv2d, torch.nn.Linear))
    )
    width = first.weight[0].numel()
    pixels_name = next(name for name in ("hidden_states", "pixel_values") if name in names)
    grid = torch.tensor([[1, side, side]] * setting.batch)
    return {pixels_name: torch.randn(setting.batch * side * side, width), "grid_thw": grid}


def by_signature(model: torch.nn.Module, setting: Setting) -> dict[str, Any]:
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    text = "input_ids" in names
    made: dict[str, Any] = {}
    if text:
        made["input_ids"] = tokens(setting)
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = tokens(setting, setting.seq // 2)
    if "pixel_values" in names and not text:
        made["pixel_values"] = pixels(setting, config)
    if "input_values" in names:
        made["input_values"] = torch.randn(setting.batch, WAVE)
    if "input_features" in names:
        made["input_features"] = torch.randn(setting.batch, getattr(config, "num_mel_bins", None) or 16, FRAMES)
    if "past_values" in names:
        made["past_values"] = torch.randn(setting.batch, HISTORY)
    if "grid_thw" in names:
        made.update(packed_patches(model, setting))
    if "use_cache" in names:
        made["use_cache"] = False
    return made


def padded(model: torch.nn.Module, setting: Setting, made: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a padding mask: to the left for decoders, to the right for the others."""
    decoder = "use_cache" in made and "decoder_input_ids" not in made
    return {**made, "attention_mask": padding_mask(setting, setting.seq, left=decoder)}


def decoding(model: Any, setting: Setting, prompt: int = 32) -> dict[str, Any]:
    """One new token after a prompt that is in the cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(setting, prompt), past_key_values=cache, use_cache=True)
    positions = torch.full((setting.batch, 1), prompt)
    return {"input_ids": tokens(setting, 1), "past_key_values": cache, "use_cache": True, "position_ids": positions}
