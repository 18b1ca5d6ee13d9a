"""The decoder-only language models of the coverage tables, as tiny random models that generate text."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.coverage.decoders import ROWS
from benchmarks.coverage.tiny import tiny_config
from benchmarks.coverage.transformers_row import Row, fill_zeros

# Encoders that transformers also runs as decoders, models of sound or with inputs of their own, and one that sorts
# its queries by random hashes.
NO_LANGUAGE_MODELS = (
    "bert", "bert_generation", "big_bird", "camembert", "data2vec_text", "electra", "ernie", "megatron_bert", "rembert",
    "roberta", "roberta_prelayernorm", "roc_bert", "roformer", "xlm_roberta", "xlm_roberta_xl", "xmod",
    "cpmant", "moshi", "trocr_decoder",
    "reformer",
)  # fmt: skip


def families() -> dict[str, Row]:
    """By name: what has attention and a causal language model in transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = (row for row in ROWS if not row.negative and row.family not in NO_LANGUAGE_MODELS)
    return {row.family: row for row in rows if _config_class(row).model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def build(family: str, attention: str | None = None) -> nn.Module:
    """Two layers in float32; `attention` is transformers' attn_implementation, None its own choice."""
    import transformers

    transformers.logging.set_verbosity_error()
    row = families()[family]
    config = tiny_config(_config_class(row), **row.config)
    torch.manual_seed(0)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = transformers.AutoModelForCausalLM.from_config(config, **chosen).float().eval()
    fill_zeros(model)
    return model


def _config_class(row: Row) -> type:
    import transformers

    return getattr(transformers, row.model).config_class
