"""Any transformers config, made small: the sizes below replace the defaults, in nested configs too."""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY = 128
WIDTH, FEED_FORWARD, HEADS, KV_HEADS, HEAD_SIZE, LAYERS, EXPERTS = 64, 128, 4, 2, 16, 2, 4
IMAGE, PATCH, POSITIONS = 32, 8, 256
SECTIONS = [2, 3, 3]  # of half a head: time, height, width

# Every name that configs use for a size, by what the size is. A config takes those that it has.
_NAMES = (
    (VOCABULARY, "vocab_size src_vocab_size tgt_vocab_size text_vocab_size entity_vocab_size"),
    (WIDTH, """hidden_size d_model n_embd embed_dim embedding_size dim decoder_hidden_size encoder_hidden_size
        projection_dim output_dim word_embed_proj_dim emb_dim width embed_size cross_attention_hidden_size
        text_hidden_size encoder_dim decoder_dim"""),
    (FEED_FORWARD, """intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner ffn_hidden_size
        mlp_dim dff dim_feedforward encoder_dim_feedforward dim_ff encoder_intermediate_size
        decoder_intermediate_size ff_dim"""),
    (HEADS, """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads decoder_num_attention_heads
        encoder_num_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads"""),
    (KV_HEADS, """num_key_value_heads num_kv_heads decoder_num_key_value_heads encoder_num_key_value_heads
        swa_num_key_value_heads linear_num_key_heads"""),
    (HEAD_SIZE, """head_dim d_kv attention_head_dim qk_nope_head_dim v_head_dim swa_head_dim linear_key_head_dim
        linear_value_head_dim linear_head_dim kv_lora_rank attention_head_size kv_channels"""),
    (HEAD_SIZE // 2, "qk_rope_head_dim rotary_dim"),
    (LAYERS, """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth decoder_num_hidden_layers encoder_num_hidden_layers decoder_num_layers
        encoder_num_layers num_blocks layers num_experts_per_tok moe_top_k num_experts_per_token"""),
    (2 * WIDTH, "max_len"),
    (EXPERTS, """num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"""),
    (WIDTH // 2, """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        q_lora_rank expert_intermediate_size expert_ffn_hidden_size"""),
    (POSITIONS, """max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions
        max_sequence_length seq_length"""),
    (IMAGE, "image_size"),
    (PATCH, "patch_size"),
    (16, "sliding_window num_mel_bins num_queries attention_window"),
    (1, "n_group topk_group num_nextn_predict_layers first_k_dense_replace n_shared_experts"),
)  # fmt: skip
SIZES = {name: size for size, names in _NAMES for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(config_class: type, **overrides: Any) -> Any:
    """A small config of that class. An override of a nested config is a dict of overrides for that one."""
    return config_class(**tiny_fields(config_class, overrides))


def tiny_fields(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a small config: sizes, special tokens, nested configs, then the overrides."""
    nested = getattr(config_class, "sub_configs", {})
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    chosen = {name: SIZES[name] for name, field in fields.items() if name in SIZES and _is_size(field.default)}
    chosen |= {name: token for name, token in TOKENS.items() if name in fields and name not in nested}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        chosen["num_key_value_heads"] = HEADS  # latent attention has keys per head
    defaults = config_class()
    rope = getattr(defaults, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        chosen["rope_parameters"] = {**rope, "mrope_section": SECTIONS}
    for name in nested:
        default, wanted = getattr(defaults, name, None), overrides.get(name, {})
        if default is not None and isinstance(wanted, dict):
            kind = type(default)
            chosen[name] = {"model_type": kind.model_type, **tiny_fields(kind, wanted)}
    return {**chosen, **{name: value for name, value in overrides.items() if name not in nested or name not in chosen}}


def _is_size(default: Any) -> bool:
    return default is None or (isinstance(default, int) and not isinstance(default, bool))
