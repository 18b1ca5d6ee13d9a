"""The models that are measured: small real configs of transformers and diffusers with attention by SDPA."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sgl_npu.compiler.demo import DemoModel, demo_models


def llama(layers: int, tokens: int = 37, hidden: int = 64, attention: str = "sdpa") -> DemoModel:
    """A narrow Llama of any depth: its compile time is that of a real one, its weights are not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return DemoModel(
        f"Llama-{layers}", LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 128, (2, tokens))}
    )


def bert() -> DemoModel:
    """A BERT encoder with a padding mask."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    mask = torch.ones(4, 256, dtype=torch.long)
    mask[-1, 200:] = 0
    return DemoModel(
        "BERT + padding",
        BertModel(config).eval(),
        {"input_ids": torch.randint(0, 1000, (4, 256)), "attention_mask": mask},
    )


def gpt2() -> DemoModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=1000, n_embd=256, n_layer=4, n_head=4, n_positions=512, attn_implementation="sdpa")
    torch.manual_seed(0)
    return DemoModel(
        "GPT-2", GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(0, 1000, (2, 256)), "use_cache": True}
    )


SPEED_MODELS: dict[str, Callable[[], DemoModel]] = {**demo_models(), "GPT-2": gpt2, "BERT + padding": bert}
