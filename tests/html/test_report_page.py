"""docs/report.md: its code runs, its pictures are there, and its numbers are those of the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from page_code import code_blocks
from typer.testing import CliRunner

from sgl_npu.compiler.cli import app
from sgl_npu.compiler.html import SIZE_LIMIT
from sgl_npu.compiler.html.mask_picture import HEADS
from sgl_npu.compiler.html.parts import LARGE_LIMIT
from sgl_npu.compiler.html.timeline import BYTES_PER_SECOND, OPERATIONS_PER_SECOND
from sgl_npu.compiler.trace_raster import CELLS

PAGE = Path(__file__).parents[2] / "docs" / "report.md"
TEXT = PAGE.read_text(encoding="utf-8")
SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "path" / "to" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("block", code_blocks(PAGE, "sh"))
def test_the_commands_of_the_page(folder, block):
    pytest.importorskip("transformers")
    for line in block.strip().splitlines():
        command = shlex.split(line)
        assert command.pop(0) == "sgl-npu"
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        text = (folder / command[command.index("--html") + 1]).read_text(encoding="utf-8")
        assert "2 of 2" in text
        assert ("rank 3" in text) == ("parallel.ring=4" in line)


@pytest.mark.slow
def test_the_example_of_the_page(folder):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **SIZES)).eval().bfloat16()
    (code,) = code_blocks(PAGE)
    with torch.no_grad():
        exec(compile(code, str(PAGE), "exec"), {"model": model, "input_ids": torch.zeros(1, 16, dtype=torch.long)})
    assert "<h1>Llama, 2 layers</h1>" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", re.findall(r"!\[.*?\]\((.*?)\)", TEXT))
def test_the_pictures_of_the_page_are_small_enough(name):
    content = (PAGE.parent / name).read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 300_000


def test_the_numbers_of_the_page():
    limits = f"under {SIZE_LIMIT / 1e6:.0f} MB", f"{LARGE_LIMIT / 1e6:.1f} MB of those", f"longer than {CELLS} cells"
    speeds = f"{OPERATIONS_PER_SECOND / 1e12:.0f} TFLOP/s", f"{BYTES_PER_SECOND / 1e9:.0f} GB/s"
    for number in (*limits, *speeds):
        assert number in " ".join(TEXT.split()), number
    assert HEADS == 4 and "first four heads" in TEXT
