"""The README as a new user types it: its Python runs, from top to bottom, and so does every command."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from page_code import code_blocks
from sparse.sparse_cases import small_wan, wan_inputs
from torch import nn

import sgl_npu

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# Indented, with what it does behind two spaces or a sign; `make test` is what runs this.
COMMANDS = re.findall(r"^    ((?:sgl-npu|make) .*?)(?:  .*| *#.*)?$", README.read_text(), re.MULTILINE)
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3, "vocab_size": 100,
}  # fmt: skip
MODEL = """
import torch
from torch import nn

class MyModel(nn.Module):
    def forward(self, x):
        heads = x.unflatten(-1, (4, 16)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)

"""


def small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG, "num_hidden_layers": 1}, pad_token_id=0)).eval()


class Logits(nn.Module):
    """What an engine calls: tensors in, one tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_llama()

    def forward(self, input_ids, position_ids=None):
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


@pytest.mark.slow
@torch.no_grad()
def test_the_code_runs():
    use, _, parallel, sparse, generation, replay = code_blocks(README)
    torch._dynamo.reset()
    model, input_ids = Logits(), torch.randint(1, 100, (1, 4))
    names = {"model": model, "input_ids": input_ids, "args": (input_ids,)}
    exec(compile(use, "README, Use", "exec"), names)
    expected = model(input_ids)
    for way in (names["compiled"], names["program"].module()):
        torch.testing.assert_close(way(input_ids), expected, atol=1e-2, rtol=1e-2)
    exec(compile(parallel, "README, ranks", "exec"), names)  # is checked when it is called, by then under torchrun

    inputs = wan_inputs(4, 16, 16)
    names |= {"step": 3, "transformer": small_wan(layers=1)}
    names |= dict(zip(("latents", "timestep", "prompt"), inputs.values(), strict=False))
    exec(compile(sparse, "README, sparse", "exec"), names)
    assert sgl_npu.reports()[-1].sites[0].kernel == "rain_fusion_attn"

    inputs = {"input_ids": input_ids, "max_new_tokens": 3, "do_sample": False}
    wanted = model.model.generate(**inputs)
    names |= {"model": small_llama(), "inputs": inputs}
    exec(compile(generation, "README, generate", "exec"), names)
    assert torch.equal(names["model"].generate(**inputs), wanted)

    names |= {"compiled": torch.compile(model, backend="sgl_npu"), "position_ids": torch.arange(4)[None]}
    exec(compile(replay, "README, replay", "exec"), names)
    torch.testing.assert_close(names["logits"], expected, atol=1e-4, rtol=1e-4)


def test_the_page_has_the_commands():
    assert {shlex.split(command)[1] for command in COMMANDS if command.startswith("sgl-npu")} == {
        "doctor", "explain", "export", "bench", "demo",
    }  # fmt: skip
    assert [command for command in COMMANDS if command.startswith("make")] == ["make demo", "make test"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder that has what the commands name."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_package").mkdir()
    (folder / "my_package/__init__.py").touch()
    (folder / "my_package/models.py").write_text(MODEL + code_blocks(README)[1])
    for place in ("path/to", "path/to/transformers"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder)}
    shell = ["bash", "-c", f"{command}; exit $?"]  # completion asks which shell has called it
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("sgl-npu")])
def test_a_command_runs(command, project):
    result = run(command, project)
    if " export " in command and result.returncode == 1:  # what needs torch_npu is missing, and that is said
        assert "torch_npu" in result.stderr or "torch-npu" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
    assert result.stdout
    for name in re.findall(r"--(?:html|out) (\S+)", command):
        assert (project / name).exists()


@pytest.mark.slow
def test_completion_is_installed(project):
    assert "`sgl-npu --install-completion`" in README.read_text()
    result = run("sgl-npu --install-completion", project)
    assert result.returncode == 0 and "sgl-npu" in (project / ".bashrc").read_text(), result.stderr


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_knows_its_targets(target):
    """They are run by hand and by CI; a run within a test would set everything up again."""
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout, result.stderr
