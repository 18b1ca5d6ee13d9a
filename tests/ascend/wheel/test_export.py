"""`sgl-npu export` of a config with both Ascend compilers, started as a user starts it on the stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3,
    "vocab_size": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    command = [
        sys.executable, "-m", "stand_in", "--ge", "-m", "sgl_npu", "export", str(folder / "config.json"),
        "--out", str(folder / "out"), "--layers", "2", "--seq", "96", "--batch", "2",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return {path.name: path.read_text() for path in (folder / "out").iterdir()}


def test_every_artefact_is_written_and_listed(files):
    manifest = json.loads(files["manifest.json"])
    assert [row["file"] for row in manifest["files"]] == [
        "report.txt", "fx_graph.txt", "npugraph_ex_code.py", "ge_graph.py", "ge_graph.pbtxt",
    ]  # fmt: skip
    assert set(files) == {row["file"] for row in manifest["files"]} | {"manifest.json"}
    assert manifest["missing"] == []
    assert manifest["device"] == "npu"
    assert manifest["versions"]["torch-npu"]
    assert manifest["command"][:2] == ["sgl-npu", "export"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("fx_graph.txt", "npu.npu_fused_infer_attention_score("),
        ("npugraph_ex_code.py", "torch.ops.npu.npu_fused_infer_attention_score.out("),
        ("ge_graph.py", "ge.FusedInferAttentionScore("),
        ("ge_graph.pbtxt", 'op: "FusedInferAttentionScore"'),
    ],
)
def test_each_layer_has_one_fused_attention(files, file, text):
    assert files[file].count(text) == 2


@pytest.mark.parametrize("file", ["npugraph_ex_code.py", "ge_graph.py"])
def test_what_is_generated_is_python(files, file):
    compile(files[file], file, "exec")


def test_sizes_of_the_tokens_are_open_everywhere(files):
    assert "i64[s" in files["fx_graph.txt"]
    tokens = next(line for line in files["ge_graph.py"].splitlines() if "ge.Data(index=2" in line)
    assert "shape=[-1, -1]" in tokens
    empty = next(line for line in files["npugraph_ex_code.py"].splitlines() if "torch.empty([arg" in line)
    assert "torch.empty([arg0_1, arg1_1, 8, 128]" in empty
