"""Small random models of the families that are served on Ascend, each with inputs of any length.

Two layers each, so that a graph has what a layer costs and what a graph costs. `sites` is the number of attentions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TEXT = 24  # tokens of a prompt, where a model has one beside its picture or video
LANGUAGE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**LANGUAGE, "num_key_value_heads": 2, "head_dim": 64}


@dataclass(frozen=True)
class Model:
    """`build(attention)` makes the module: "eager" spells attention out, "sdpa" calls torch's, which is all a model of
    diffusers knows. `inputs(length)` are arguments for `length` tokens; `length_step` is what lengths are multiples of.
    """

    build: Callable[[str], torch.nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    sites: int
    spellings: tuple[str, ...] = ("eager", "sdpa")
    length_step: int = 1


def _transformers(model: str, config: str, more: dict[str, Any] | None = None, **settings: Any):
    def build(attention: str) -> torch.nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, config)(**settings)
        model_class = getattr(transformers, model)
        return model_class._from_config(made, attn_implementation=attention, **(more or {})).eval()

    return build


def _diffusers(model: str, **settings: Any) -> Callable[[str], torch.nn.Module]:
    def build(attention: str) -> torch.nn.Module:
        import diffusers

        torch.manual_seed(0)
        return getattr(diffusers, model)(**settings).eval()

    return build


def _tokens(length: int, batch: int = 2) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 256, (batch, length)), "use_cache": False}


def _padded(length: int) -> dict[str, Any]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[-1, length * 3 // 4 :] = 0
    return {"input_ids": torch.randint(0, 256, (2, length)), "attention_mask": mask}


def _two_sequences(length: int) -> dict[str, Any]:
    ids = torch.randint(0, 256, (2, length))
    return {"input_ids": ids, "decoder_input_ids": torch.randint(0, 256, (2, length // 2)), "use_cache": False}


def _video(length: int) -> dict[str, Any]:
    """Patches of 2 x 2, two frames of four rows."""
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, length // 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "timestep": torch.full((1,), 10),
        "return_dict": False,
    }


def _flux(length: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, length, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.randint(0, 4, (length, 3)).float(),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def _qwen_image(length: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, length, 16),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.long),
        "timestep": torch.full((1,), 0.5),
        "img_shapes": [(1, 4, length // 4)],
        "return_dict": False,
    }


def _hunyuan(length: int) -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.long)
    mask[:, TEXT - 4 :] = 0
    return {
        "hidden_states": torch.randn(1, 4, 1, 4, length // 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.full((1,), 10),
        "guidance": torch.full((1,), 6.0),
        "return_dict": False,
    }


MODELS: dict[str, Model] = {
    "Llama": Model(_transformers("LlamaForCausalLM", "LlamaConfig", **GROUPED), _tokens, 2),
    "Qwen3": Model(_transformers("Qwen3ForCausalLM", "Qwen3Config", **GROUPED), _tokens, 2),
    "Qwen3-MoE": Model(
        _transformers(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            {"experts_implementation": "batched_mm"},  # torchair has no converter for grouped products
            **GROUPED,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=4,  # a choice among them flips with the rounding, and the numbers with it
        ),
        _tokens,
        2,
    ),
    "GPT-2": Model(
        _transformers("GPT2LMHeadModel", "GPT2Config", vocab_size=256, n_embd=256, n_layer=2, n_head=4), _tokens, 2
    ),
    "BERT": Model(_transformers("BertModel", "BertConfig", **LANGUAGE, max_position_embeddings=1024), _padded, 2),
    "T5": Model(
        _transformers("T5Model", "T5Config", vocab_size=256, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4),
        _two_sequences,
        6,
    ),
    "Wan": Model(
        _diffusers(
            "WanTransformer3DModel",
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=64,
            ffn_dim=256,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ),
        _video,
        4,
        ("sdpa",),
        8,
    ),
    "QwenImage": Model(
        _diffusers(
            "QwenImageTransformer2DModel",
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=(16, 24, 24),
        ),
        _qwen_image,
        2,
        ("sdpa",),
        4,
    ),
    "Flux": Model(
        _diffusers(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(16, 24, 24),
        ),
        _flux,
        2,
        ("sdpa",),
    ),
    "HunyuanVideo": Model(
        _diffusers(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=64,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(16, 24, 24),
        ),
        _hunyuan,
        3,
        ("sdpa",),
        4,
    ),
}

# Two layers more: what a layer costs, beside what a graph costs.
DEEPER: dict[str, Model] = {
    name: Model(_transformers(f"{name}ForCausalLM", f"{name}Config", **{**GROUPED, "num_hidden_layers": 4}), _tokens, 4)
    for name in ("Llama", "Qwen3")
}
