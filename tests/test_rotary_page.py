"""The example of docs/rotary.md, on a small Qwen3."""

import re
from pathlib import Path

import torch
from page_code import code_blocks
from transformers import Qwen3Config, Qwen3Model

PAGE = Path(__file__).parent.parent / "docs" / "rotary.md"


def test_the_example_of_the_page(capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3Model(Qwen3Config(num_hidden_layers=1, head_dim=16, vocab_size=32, **sizes)).eval().bfloat16()
    (code,) = code_blocks(PAGE)
    with torch.no_grad():
        exec(compile(code, str(PAGE), "exec"), {"model": model, "input_ids": torch.randint(0, 32, (1, 8))})
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*#\s(.*)", code)[1]
