"""The masks that transformers' own models build, proved through the whole backend."""

from __future__ import annotations

import pytest
import torch
from compiled_report import compiled

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
IDS = torch.arange(3, 23).view(2, 10)
PADDED = torch.ones(2, 10, dtype=torch.long)
PADDED[0, :3] = 0
MODELS = {
    "Llama": ("Llama", {}, {}, "causal"),
    "Llama padded": ("Llama", {}, {"attention_mask": PADDED}, "causal & tensor"),
    "Llama with a cache": ("Llama", {}, {"use_cache": True}, "causal"),
    "Llama with given positions": ("Llama", {}, {"position_ids": torch.arange(10).expand(2, -1)}, "documents & tensor"),
    "Mistral": ("Mistral", {"sliding_window": 4}, {}, "band(-3, 0)"),
    "Mistral padded": ("Mistral", {"sliding_window": 4}, {"attention_mask": PADDED}, "band(-3, 0) & tensor"),
    "Gemma3": ("Gemma3Text", {"sliding_window": 4}, {}, "band(-3, 0)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "inputs", "text"), MODELS.values(), ids=MODELS.keys())
def test_masks_of_transformers(name, config, inputs, text):
    transformers = pytest.importorskip("transformers")
    settings = getattr(transformers, f"{name}Config")(**{**SMALL, **config})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(settings).eval()
    model.config._attn_implementation = "sdpa"

    def run(ids, kwargs):
        return model(input_ids=ids, **{"use_cache": False, **kwargs})[0]

    reports = compiled(run, IDS, inputs, platform="cpu")
    assert [site.mask for report in reports for site in report.sites] == [text] * 2
