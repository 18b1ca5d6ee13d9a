"""Families of diffusers. "sdpa" is what a class does by itself, "eager" the processor that spells attention out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.coverage.case import Built, Case, Setting
from benchmarks.coverage.inputs import padding_mask
from benchmarks.coverage.transformers_row import fill_zeros

BOTH, SDPA = ("sdpa", "eager"), ("sdpa",)


@dataclass(frozen=True)
class Diffusion:
    """One class of diffusers. `shapes` are float inputs, less the batch; `more` makes the others."""

    family: str
    model: str
    sites: int | None
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    more: Callable[[Setting], dict[str, Any]] = lambda setting: {}
    spellings: tuple[str, ...] = SDPA
    negative: bool = False


def step(setting: Setting) -> dict[str, Any]:
    return {"timestep": torch.full((setting.batch,), 10)}


def float_step(setting: Setting) -> dict[str, Any]:
    return {"timestep": torch.full((setting.batch,), 0.5)}


def scalar_step(setting: Setting) -> dict[str, Any]:
    return {"timestep": 10}


def text_mask(length: int, name: str = "encoder_attention_mask") -> Callable[[Setting], dict[str, Any]]:
    return lambda s: {**step(s), name: padding_mask(s, length, left=False)}


def _bool_mask(length: int) -> Callable[[Setting], dict[str, Any]]:
    return lambda s: {**step(s), "encoder_attention_mask": padding_mask(s, length, left=False).bool()}


def _with(*makers: Callable[[Setting], dict[str, Any]], **constants: Any) -> Callable[[Setting], dict[str, Any]]:
    return lambda s: {**{name: value for make in makers for name, value in make(s).items()}, **constants}


def _flux(s: Setting) -> dict[str, Any]:
    return {**float_step(s), "img_ids": torch.randint(0, 4, (16, 3)).float(), "txt_ids": torch.zeros(8, 3)}


def _pixart(s: Setting) -> dict[str, Any]:
    return {**text_mask(12)(s), "added_cond_kwargs": {"aspect_ratio": None, "resolution": None}}


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 64, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip
VIDEO = {"hidden_states": (4, 2, 16, 16), "encoder_hidden_states": (12, 16)}
PATCHED = {
    "sample_size": 8, "patch_size": 2, "attention_head_dim": 8, "attention_bias": True, "in_channels": 4,
    "out_channels": 8, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
}  # fmt: skip
UNET = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8, "layers_per_block": 1}
VAE = {
    "block_out_channels": [32, 32], "in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
}  # fmt: skip


def _without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}


ROWS = (
    Diffusion("wan", "WanTransformer3DModel", 4, WAN, VIDEO, step),
    Diffusion("wan_image", "WanTransformer3DModel", 6, {**WAN, "image_dim": 16, "added_kv_proj_dim": 24},
              {**VIDEO, "encoder_hidden_states": (512, 16), "encoder_hidden_states_image": (8, 16)}, step),
    Diffusion("skyreels_v2", "SkyReelsV2Transformer3DModel", 4, WAN, VIDEO, step),
    Diffusion("chronoedit", "ChronoEditTransformer3DModel", 4, WAN, VIDEO, step),
    Diffusion("flux", "FluxTransformer2DModel", 2,
              {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
               "axes_dims_rope": [4, 4, 8]},
              {"hidden_states": (16, 4), "encoder_hidden_states": (8, 32), "pooled_projections": (32,)}, _flux),
    Diffusion("chroma", "ChromaTransformer2DModel", 2,
              {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8],
               "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
              {"hidden_states": (16, 4), "encoder_hidden_states": (8, 32)}, _flux),
    Diffusion("bria", "BriaTransformer2DModel", 2,
              {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
               "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": None,
               "axes_dims_rope": [0, 4, 4]},
              {"hidden_states": (16, 4), "encoder_hidden_states": (8, 32)}, _flux),
    Diffusion("sd3", "SD3Transformer2DModel", 2,
              {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
               "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32,
               "pooled_projection_dim": 64, "out_channels": 4},
              {"hidden_states": (4, 16, 16), "encoder_hidden_states": (12, 32), "pooled_projections": (64,)}, step),
    Diffusion("aura_flow", "AuraFlowTransformer2DModel", 2,
              {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
               "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32,
               "joint_attention_dim": 32, "out_channels": 4, "pos_embed_max_size": 256},
              {"hidden_states": (4, 16, 16), "encoder_hidden_states": (12, 32)}, float_step),
    Diffusion("qwenimage", "QwenImageTransformer2DModel", 2,
              {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
               "num_attention_heads": 3, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
              {"hidden_states": (16, 16), "encoder_hidden_states": (7, 16)},
              lambda s: {**float_step(s), "encoder_hidden_states_mask": torch.ones(s.batch, 7, dtype=torch.long),
                         "img_shapes": [(1, 4, 4)] * s.batch}),
    Diffusion("hunyuan_video", "HunyuanVideoTransformer3DModel", 3,
              {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
               "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
               "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
              {"hidden_states": (4, 1, 8, 8), "encoder_hidden_states": (12, 16), "pooled_projections": (8,)},
              lambda s: {**text_mask(12)(s), "guidance": torch.full((s.batch,), 6.0)}),
    Diffusion("cogvideox", "CogVideoXTransformer3DModel", 2,
              {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
               "time_embed_dim": 8, "text_embed_dim": 32, "num_layers": 2, "sample_width": 8, "sample_height": 8,
               "sample_frames": 5, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 8},
              {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (8, 32)}, step),
    Diffusion("cogview3plus", "CogView3PlusTransformer2DModel", 2,
              {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2,
               "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 2,
               "pos_embed_max_size": 8, "sample_size": 8},
              {"hidden_states": (4, 8, 8), "encoder_hidden_states": (8, 8)},
              lambda s: {**step(s), **{name: torch.tensor([[16.0, 16.0]] * s.batch)
                                       for name in ("original_size", "target_size", "crop_coords")}}),
    Diffusion("cogview4", "CogView4Transformer2DModel", 2,
              {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
               "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4, "sample_size": 8,
               "rope_axes_dim": (4, 4)},
              {"hidden_states": (4, 8, 8), "encoder_hidden_states": (8, 8)},
              lambda s: {**step(s), **{name: torch.tensor([[16.0, 16.0]] * s.batch)
                                       for name in ("original_size", "target_size", "crop_coords")}}),
    Diffusion("ltx", "LTXVideoTransformer3DModel", 4,
              {"in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8,
               "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16},
              {"hidden_states": (32, 8), "encoder_hidden_states": (12, 16)},
              _with(_bool_mask(12), num_frames=2, height=4, width=4)),
    Diffusion("pixart", "PixArtTransformer2DModel", 4,
              {**PATCHED, "num_layers": 2, "num_attention_heads": 4, "caption_channels": 16,
               "cross_attention_dim": 32, "use_additional_conditions": False},
              {"hidden_states": (4, 8, 8), "encoder_hidden_states": (12, 16)}, _pixart, BOTH),
    Diffusion("dit", "DiTTransformer2DModel", 2,
              {**PATCHED, "num_layers": 2, "num_attention_heads": 4, "norm_type": "ada_norm_zero"},
              {"hidden_states": (4, 8, 8)},
              lambda s: {**step(s), "class_labels": torch.zeros(s.batch, dtype=torch.long)}, BOTH),
    Diffusion("latte", "LatteTransformer3DModel", 3,
              {**PATCHED, "num_layers": 1, "num_attention_heads": 3, "caption_channels": 32, "cross_attention_dim": 24,
               "video_length": 2},
              {"hidden_states": (4, 2, 8, 8), "encoder_hidden_states": (12, 32)},
              _with(step, enable_temporal_attentions=True)),
    Diffusion("transformer2d", "Transformer2DModel", 2,
              {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "num_layers": 1,
               "cross_attention_dim": 16, "norm_num_groups": 8},
              {"hidden_states": (32, 8, 8), "encoder_hidden_states": (12, 16)}, lambda s: {}, BOTH),
    Diffusion("transformer_temporal", "TransformerTemporalModel", 2,
              {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "num_layers": 1,
               "norm_num_groups": 8},
              {"hidden_states": (32, 8, 8)}, _with(num_frames=2), BOTH),
    Diffusion("prior", "PriorTransformer", 2,
              {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 16,
               "num_embeddings": 7, "additional_embeddings": 4},
              {"hidden_states": (16,), "proj_embedding": (16,), "encoder_hidden_states": (7, 16)}, step, BOTH),
    Diffusion("mochi", "MochiTransformer3DModel", 5,
              {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
               "pooled_projection_dim": 16, "in_channels": 12, "qk_norm": "rms_norm", "text_embed_dim": 16,
               "time_embed_dim": 4, "activation_fn": "swiglu", "max_sequence_length": 16},
              {"hidden_states": (12, 2, 8, 8), "encoder_hidden_states": (12, 16)}, _bool_mask(12)),
    Diffusion("allegro", "AllegroTransformer3DModel", 4,
              {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
               "num_layers": 2, "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
               "caption_channels": 24},
              {"hidden_states": (4, 2, 8, 8), "encoder_hidden_states": (12, 24), "attention_mask": (2, 8, 8)},
              _with(text_mask(12), image_rotary_emb=None)),
    Diffusion("sana", "SanaTransformer2DModel", 2,
              {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 4,
               "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
               "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 8},
              {"hidden_states": (4, 8, 8), "encoder_hidden_states": (12, 8)}, step),
    Diffusion("stable_audio", "StableAudioDiTModel", 4,
              {"sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
               "num_attention_heads": 4, "num_key_value_attention_heads": 2, "out_channels": 4,
               "cross_attention_dim": 16, "time_proj_dim": 8, "global_states_input_dim": 8,
               "cross_attention_input_dim": 16},
              {"hidden_states": (4, 16), "encoder_hidden_states": (12, 16), "global_hidden_states": (1, 8)},
              lambda s: {**float_step(s), "rotary_embedding": (torch.ones(17, 4), torch.zeros(17, 4))}),
    Diffusion("lumina2", "Lumina2Transformer2DModel", 4,
              {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
               "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
               "ffn_dim_multiplier": None, "norm_eps": 1e-5, "scaling_factor": 1.0, "axes_dim_rope": (4, 2, 2),
               "axes_lens": (128, 128, 128), "cap_feat_dim": 8},
              {"hidden_states": (4, 16, 16), "encoder_hidden_states": (12, 8)},
              lambda s: {**float_step(s), "encoder_attention_mask": torch.ones(s.batch, 12, dtype=torch.bool)}),
    Diffusion("omnigen", "OmniGenTransformer2DModel", 2,
              {"in_channels": 4, "patch_size": 2, "hidden_size": 16, "num_attention_heads": 4,
               "num_key_value_heads": 4, "intermediate_size": 32, "num_layers": 2, "pad_token_id": 0,
               "vocab_size": 1000, "rope_scaling": {"long_factor": [1.0, 1.0], "short_factor": [1.0, 1.0]}},
              {"hidden_states": (4, 8, 8)},
              lambda s: {**float_step(s), "input_ids": torch.randint(0, 10, (s.batch, 12)), "input_img_latents": [],
                         "input_image_sizes": {}, "attention_mask": torch.ones(s.batch, 29, 29),
                         "position_ids": torch.arange(29)[None].expand(s.batch, -1)}),
    Diffusion("unet2d", "UNet2DModel", 4,
              {**UNET, "block_out_channels": (32, 64), "attention_head_dim": 8,
               "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
               "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
              {"sample": (4, 16, 16)}, step, BOTH),
    Diffusion("unet2d_condition", "UNet2DConditionModel", 8,
              {**UNET, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
               "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32,
               "attention_head_dim": 4},
              {"sample": (4, 16, 16), "encoder_hidden_states": (12, 32)}, scalar_step, BOTH),
    Diffusion("unet3d_condition", "UNet3DConditionModel", 18,
              {**UNET, "block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
               "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": 32,
               "attention_head_dim": 8},
              {"sample": (4, 2, 16, 16), "encoder_hidden_states": (12, 32)}, scalar_step, BOTH),
    Diffusion("unet_spatio_temporal", "UNetSpatioTemporalConditionModel", 16,
              {"sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
               "block_out_channels": (32, 64), "num_attention_heads": (2, 4), "cross_attention_dim": 16,
               "projection_class_embeddings_input_dim": 24, "addition_time_embed_dim": 8,
               "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
               "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")},
              {"sample": (2, 4, 16, 16), "encoder_hidden_states": (1, 16)},
              lambda s: {"timestep": 10, "added_time_ids": torch.ones(s.batch, 3)}, BOTH),
    Diffusion("controlnet", "ControlNetModel", 4,
              {"in_channels": 4, "norm_num_groups": 8, "layers_per_block": 1, "block_out_channels": (32, 64),
               "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
               "attention_head_dim": 4, "conditioning_embedding_out_channels": (16, 32)},
              {"sample": (4, 16, 16), "encoder_hidden_states": (12, 32), "controlnet_cond": (3, 32, 32)}, scalar_step,
              BOTH),
    Diffusion("uvit2d", "UVit2DModel", 6,
              {"hidden_size": 32, "cond_embed_dim": 16, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
               "encoder_hidden_size": 16, "vocab_size": 32, "codebook_size": 32, "in_channels": 32,
               "block_out_channels": 32, "num_res_blocks": 1, "downsample": True, "upsample": True,
               "block_num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
               "use_bias": False},
              {"encoder_hidden_states": (12, 16), "pooled_text_emb": (16,), "micro_conds": (5,)},
              lambda s: {"input_ids": torch.randint(0, 32, (s.batch, 8, 8))}, BOTH),
    Diffusion("autoencoder_kl", "AutoencoderKL", 2, {**VAE, "up_block_types": ["UpDecoderBlock2D"] * 2},
              {"sample": (3, 16, 16)}, lambda s: {}, BOTH),
    Diffusion("autoencoder_asymmetric", "AsymmetricAutoencoderKL", 2,
              {**_without(VAE, "block_out_channels"), "down_block_out_channels": [32, 32], "layers_per_down_block": 1,
               "up_block_types": ["UpDecoderBlock2D"] * 2, "up_block_out_channels": [32, 32],
               "layers_per_up_block": 1},
              {"sample": (3, 16, 16)}, lambda s: {}, BOTH),
    Diffusion("autoencoder_wan", "AutoencoderKLWan", 2,
              {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]},
              {"sample": (3, 1, 16, 16)}),
    Diffusion("vq", "VQModel", 2,
              {"block_out_channels": [32, 32], "in_channels": 3, "out_channels": 3, "latent_channels": 3,
               "norm_num_groups": 8, "down_block_types": ["DownEncoderBlock2D"] * 2,
               "up_block_types": ["UpDecoderBlock2D"] * 2},
              {"sample": (3, 16, 16)}, lambda s: {}, BOTH),
    Diffusion("autoencoder_tiny", "AutoencoderTiny", 0,
              {"in_channels": 3, "out_channels": 3, "encoder_block_out_channels": (16, 16),
               "decoder_block_out_channels": (16, 16), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
              {"sample": (3, 16, 16)}, negative=True),
)  # fmt: skip


def cases() -> list[Case]:
    return [
        Case("diffusers", row.family, spelling, _builder(row, spelling), sites=row.sites, negative=row.negative)
        for row in ROWS
        for spelling in row.spellings
    ]


def _builder(row: Diffusion, spelling: str) -> Callable[[Setting], Built]:
    def build(setting: Setting) -> Built:
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, row.model)(**row.config).eval()
        if spelling == "eager":
            _spell_out(model)
        fill_zeros(model)
        kwargs = {name: torch.randn(setting.batch, *shape) for name, shape in row.shapes.items()}
        kwargs |= row.more(setting)
        if "return_dict" in inspect.signature(model.forward).parameters:
            kwargs["return_dict"] = False
        cast = {
            name: x.to(setting.dtype) if isinstance(x, torch.Tensor) and x.dtype is torch.float32 else x
            for name, x in kwargs.items()
        }
        return Built(model.to(setting.dtype), cast)

    return build


def _spell_out(model: Any) -> None:
    """The processor that multiplies, takes the softmax and multiplies, everywhere."""
    from diffusers.models.attention_processor import AttnProcessor

    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
