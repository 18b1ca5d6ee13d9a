"""Models whose sequence is spread over ranks: small, two layers, random weights, never told of it.

`sites` counts attentions by what they attend: "causal" and "self" one sequence, "joint" image and text concatenated,
"cross" text from an image, "text" the text alone. Each has at least four heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ascend.models import GROUPED, LANGUAGE, MODELS

VOCABULARY, CHANNELS, TEXT_WIDTH = 256, 4, 32
LANGUAGE_SIZES = ((64, 0), (96, 0), (37, 0), (50, 0), (3, 0))
IMAGE_SIZES = ((64, 24), (48, 7), (35, 24), (50, 13))
VIDEO_SIZES = ((96, 24), (48, 7), (75, 24), (66, 13))
VIDEO_FRAMES = 3  # what lengths of video are multiples of
FIXED_TEXT = 22  # of CogVideoX, whose table of positions counts it
COGVIDEO_SIZES = tuple((length, FIXED_TEXT) for length, _ in VIDEO_SIZES)
CACHE_ROOM = 128


@dataclass(frozen=True)
class Inputs:
    """What a call is asked to be like: tokens, of which `text` are a prompt's where a model has one beside images."""

    length: int
    text: int = 24
    batch: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """`build()` makes the module in float32, `inputs` the arguments of a call: new ones at each call, equal ones for
    equal wishes. `sizes` are pairs of length and text, some that no number of ranks divides.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Inputs], dict[str, Any]]
    sites: dict[str, int]
    sizes: tuple[tuple[int, int], ...]

    @property
    def attentions(self) -> int:
        return sum(self.sites.values())

    def module(self, dtype: torch.dtype) -> nn.Module:
        """The module with every parameter in a dtype, also those that diffusers would rather keep in float32."""
        return nn.Module.to(self.build(), dtype)


def outputs(result: Any) -> dict[str, Tensor]:
    """The tensors that a model gives by name, its cache's among them."""
    if isinstance(result, tuple):
        return {f"output {number}": x for number, x in enumerate(result)}
    found = {name: x for name, x in result.items() if isinstance(x, Tensor)}
    if (cache := result.get("past_key_values")) is not None:
        for number, layer in enumerate(cache.layers):
            found |= {f"layer {number} keys": layer.keys, f"layer {number} values": layer.values}
    return found


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to an output's largest value or 1."""
    assert found.keys() == expected.keys(), (list(found), list(expected))
    return max(_difference(found[name].float(), x.float()) for name, x in expected.items())


def _difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def _grid(length: int) -> tuple[int, int]:
    """Rows and columns of a picture of that many patches, as square as can be."""
    rows = next(rows for rows in range(math.isqrt(length), 0, -1) if length % rows == 0)
    return rows, length // rows


def _seeded(make: Callable[[Inputs], dict[str, Any]]) -> Callable[[Inputs], dict[str, Any]]:
    """Random inputs that follow from the seed, floating ones in the dtype."""

    def inputs(wish: Inputs) -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(wish.seed)
            made = make(wish)
        return {name: x.to(wish.dtype) if _is_floating(x) else x for name, x in made.items()}

    return inputs


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _tokens(wish: Inputs) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, VOCABULARY, (wish.batch, wish.length)), "use_cache": False}


def _dynamic_cache(wish: Inputs) -> dict[str, Any]:
    return {**_tokens(wish), "use_cache": True}


def _static_cache(wish: Inputs) -> dict[str, Any]:
    from transformers import StaticCache

    cache = StaticCache(_llama_config(), max_cache_len=CACHE_ROOM)
    heads, size = LLAMA["num_key_value_heads"], LLAMA["head_dim"]
    cache.early_initialization(wish.batch, heads, size, wish.dtype, torch.device("cpu"))
    return {**_tokens(wish), "use_cache": True, "past_key_values": cache}


def _padded(wish: Inputs) -> dict[str, Any]:
    """The last sequence of a batch has padding at its end."""
    mask = torch.ones(wish.batch, wish.length, dtype=torch.long)
    if wish.batch > 1:
        mask[-1, wish.length - wish.length // 4 :] = 0
    return {"input_ids": torch.randint(0, VOCABULARY, (wish.batch, wish.length)), "attention_mask": mask}


def _text(wish: Inputs) -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(wish.batch, wish.text, TEXT_WIDTH),
        "timestep": torch.full((wish.batch,), 10),
        "return_dict": False,
    }


def _pooled(wish: Inputs) -> dict[str, Any]:
    return {**_text(wish), "pooled_projections": torch.randn(wish.batch, TEXT_WIDTH)}


def _wan(wish: Inputs) -> dict[str, Any]:
    rows, columns = _grid(wish.length // VIDEO_FRAMES)
    video = torch.randn(wish.batch, CHANNELS, VIDEO_FRAMES, 2 * rows, 2 * columns)
    return {**_text(wish), "hidden_states": video}


def _cogvideo(wish: Inputs) -> dict[str, Any]:
    rows, columns = _grid(wish.length // VIDEO_FRAMES)
    video = torch.randn(wish.batch, VIDEO_FRAMES, CHANNELS, 2 * rows, 2 * columns)
    return {**_text(wish), "hidden_states": video}


def _hunyuan(wish: Inputs) -> dict[str, Any]:
    """Padded text: its last quarter is masked."""
    rows, columns = _grid(wish.length // VIDEO_FRAMES)
    mask = torch.ones(wish.batch, wish.text, dtype=torch.long)
    mask[:, wish.text - wish.text // 4 :] = 0
    return {
        **_pooled(wish),
        "hidden_states": torch.randn(wish.batch, CHANNELS, VIDEO_FRAMES, rows, columns),
        "encoder_attention_mask": mask,
        "guidance": torch.full((wish.batch,), 6.0),
    }


def _sd3(wish: Inputs) -> dict[str, Any]:
    rows, columns = _grid(wish.length)
    return {**_pooled(wish), "hidden_states": torch.randn(wish.batch, CHANNELS, 2 * rows, 2 * columns)}


def _flux(wish: Inputs) -> dict[str, Any]:
    return {
        **_pooled(wish),
        "hidden_states": torch.randn(wish.batch, wish.length, CHANNELS),
        "timestep": torch.full((wish.batch,), 0.5),
        "img_ids": torch.randint(0, 4, (wish.length, 3)).float(),
        "txt_ids": torch.zeros(wish.text, 3),
    }


def _qwen_image(wish: Inputs) -> dict[str, Any]:
    return {
        **_text(wish),
        "hidden_states": torch.randn(wish.batch, wish.length, 16),
        "encoder_hidden_states_mask": torch.ones(wish.batch, wish.text, dtype=torch.long),
        "timestep": torch.full((wish.batch,), 0.5),
        "img_shapes": [(1, *_grid(wish.length))] * wish.batch,
    }


LLAMA: dict[str, Any] = {**GROUPED, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}


def _llama_config(**settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**LLAMA, "max_position_embeddings": 1 << 16, **settings})


def llama(**settings: Any) -> nn.Module:
    """A Llama with eight heads of queries, two of keys; settings are those of its config."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(_llama_config(**settings)).eval()


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**LANGUAGE, max_position_embeddings=1024)).eval()


def _stable_diffusion() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=64,
    ).eval()


def _cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=FIXED_TEXT,
    ).eval()


def _ascend(name: str) -> Callable[[], nn.Module]:
    """The model of that name that is measured on Ascend."""
    return lambda: MODELS[name].build("sdpa")


CASES = {
    case.name: case
    for case in (
        Case("Llama", llama, _seeded(_tokens), {"causal": 2}, LANGUAGE_SIZES),
        Case("Llama, dynamic cache", llama, _seeded(_dynamic_cache), {"causal": 2}, LANGUAGE_SIZES),
        Case("Llama, static cache", llama, _seeded(_static_cache), {"causal": 2}, LANGUAGE_SIZES),
        # Experts by "batched_mm" or "grouped_mm" have one graph; "eager" loops over those that were hit and has none.
        Case("Qwen3-MoE", _ascend("Qwen3-MoE"), _seeded(_tokens), {"causal": 2}, LANGUAGE_SIZES),
        Case("BERT", _bert, _seeded(_padded), {"self": 2}, LANGUAGE_SIZES),
        Case("Wan", _ascend("Wan"), _seeded(_wan), {"self": 2, "cross": 2}, VIDEO_SIZES),
        Case("Flux", _ascend("Flux"), _seeded(_flux), {"joint": 2}, IMAGE_SIZES),
        Case("SD3", _stable_diffusion, _seeded(_sd3), {"joint": 2}, IMAGE_SIZES),
        Case("QwenImage", _ascend("QwenImage"), _seeded(_qwen_image), {"joint": 2}, IMAGE_SIZES),
        Case("HunyuanVideo", _ascend("HunyuanVideo"), _seeded(_hunyuan), {"joint": 2, "text": 1}, VIDEO_SIZES),
        Case("CogVideoX", _cogvideox, _seeded(_cogvideo), {"joint": 2}, COGVIDEO_SIZES),
    )
}
