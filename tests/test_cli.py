"""The command line: what it prints, and what it says to a mistake."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sgl_npu.compiler.cli import app
from sgl_npu.compiler.explain_target import parse_options

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3,
    "vocab_size": 100,
}  # fmt: skip
FIA = "npu.npu_fused_infer_attention_score"


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


class Layer(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def model_with_inputs():
    return Layer(), {"x": torch.randn(1, 4, 16, 64, dtype=torch.bfloat16)}


def model_with_arguments():
    return Layer(), [torch.randn(1, 4, 16, 64)], {}


def model_with_a_tuple():
    return Layer(), (torch.randn(1, 4, 16, 64),)


def model_of_size(seq, dtype=torch.float16, batch=3):
    return Layer(), (torch.randn(batch, 4, seq, 64, dtype=dtype),)


def model_alone():
    return Layer()


def nothing_of_use():
    return 1, 2


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_the_doctor_tells_every_kernel_and_every_remedy():
    found = json.loads(invoke("doctor", "--json").stdout)
    assert {row["platform"] for row in found["kernels"]} == {"npu", "cuda", "cpu"}
    assert {row["state"] for row in found["kernels"]} <= {"available", "emulated", "unavailable"}
    for row in (*found["kernels"], *(row for row in found["libraries"] if not row["present"])):
        assert row.get("state") == "available" or (row["reason"] and row["remedy"])


def test_the_doctor_prints_tables():
    result = invoke("doctor")
    assert result.exit_code == 0
    for name in ("torch_npu", "sgl-kernel-npu", "ascend_fa", "flash_cpu"):
        assert name in result.stdout
    remedies = [line for line in result.stdout.splitlines() if line.endswith(":")]
    assert remedies and len(remedies) == len(set(remedies)), "what helps is said once"


@pytest.mark.parametrize(
    ("factory", "op"),
    [
        ("model_with_inputs", FIA),
        ("model_with_arguments", "npu.npu_fusion_attention_v3"),
        ("model_with_a_tuple", "npu.npu_fusion_attention_v3"),
    ],
)
def test_a_factory_is_explained(factory, op):
    result = invoke("explain", f"{__name__}:{factory}", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["counts"] == {op: 1}


def test_a_factory_gets_the_sizes_that_it_has_arguments_for():
    site = json.loads(invoke("explain", f"{__name__}:model_of_size", "--seq", "48", "--json").stdout)["sites"][0]
    assert (site["query"], site["dtype"]) == (["3", "4", "48", "64"], "float16")
    arguments = ("--batch", "2", "--dtype", "bf16", "--json")
    site = json.loads(invoke("explain", f"{__name__}:model_of_size", *arguments).stdout)["sites"][0]
    assert (site["query"], site["dtype"]) == (["2", "4", "4096", "64"], "bfloat16")


@pytest.mark.parametrize("command", ["explain", "bench"])
def test_a_model_that_cannot_be_called_is_one_line(command):
    result = invoke(command, f"{__name__}:model_alone")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "model_alone: calling the model failed, also without a compiler: TypeError: " in result.stderr
    assert "(model, args), (model, kwargs) or (model, args, kwargs)" in result.stderr


def test_an_error_of_the_compiler_is_not_blamed_on_the_model(monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("of the compiler")

    monkeypatch.setattr("sgl_npu.compiler.cli.explain_call", failing)
    assert str(invoke("explain", f"{__name__}:model_with_inputs").exception) == "of the compiler"


def test_options_reach_the_backend():
    result = invoke("explain", f"{__name__}:model_with_inputs", "--platform", "cpu", "--option", "attention=sdpa")
    assert "no attention was found" in result.stdout


def test_values_of_options_are_json_and_dots_nest():
    assert parse_options(["strict=true", "parallel.ring=2", "parallel.ulysses=4", "attention=fa"]) == {
        "strict": True,
        "parallel": {"ring": 2, "ulysses": 4},
        "attention": "fa",
    }


def test_a_page_is_written_and_json_stays_json(tmp_path):
    path = tmp_path / "report.html"
    result = invoke("explain", f"{__name__}:model_with_inputs", "--html", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fused"] == 1
    assert f"{__name__}:model_with_inputs" in path.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path):
    result = invoke("explain", f"{__name__}:model_with_inputs", "--html", str(tmp_path))  # a folder
    assert result.exit_code == 2
    assert "error: --html" in result.stderr and "give a file in a folder that exists" in result.stderr


def test_ranks_that_do_not_exist_are_planned_for():
    ring = ("--option", "parallel.ring=4", "--option", "parallel.ulysses=2")
    result = invoke("explain", f"{__name__}:model_with_inputs", "--json", *ring)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["parallel"][0]["grid"] == "4 x 2" and found["sites"][0]["scheme"] == "local"
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("least", "code"), [("all", 0), ("1", 0), ("2", 1), ("most", 2)])
def test_too_few_fused_attentions_are_exit_code_1(least, code):
    result = invoke("explain", f"{__name__}:model_with_inputs", "--expect", least)
    assert result.exit_code == code
    expected = {0: "", 1: "error: 1 of 1 sites are fused, 2 were expected", 2: "error: --expect most: should be all"}
    assert expected[code] in result.stderr


def test_a_model_is_timed_beside_eager_and_inductor():
    arguments = ("bench", f"{__name__}:model_with_inputs", "--runs", "1", "--option", "inner=eager")
    assert "sgl_npu is " in (text := invoke(*arguments).stdout) and "x as fast as inductor" in text
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [x["variant"] for x in found["timings"]] == ["eager", "inductor", "sgl_npu"]
    assert found["fused"] == 1 and found["error"] < 2e-2 and found["speedups"].keys() == {"eager", "inductor"}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "--device tpu: should be one of cpu, cuda, npu"),
        ("cuda", "--device cuda: there is none on this machine"),
    ],
)
def test_a_device_that_is_not_there_is_exit_code_2(device, message):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    result = invoke("bench", f"{__name__}:model_with_inputs", "--device", device)
    assert result.exit_code == 2 and f"error: {message}" in result.stderr


def test_a_typo_is_told_the_command_that_was_meant():
    result = invoke("explian")
    assert result.exit_code == 2 and "Did you mean 'explain'?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_thing"], "neither package.module:factory"),
        (["no_such_module:f"], "No module named 'no_such_module'"),
        ([f"{__name__}:missing"], "has no function 'missing'; it has .*model_with_inputs"),
        (["my_models"], "or my_models:FUNCTION"),
        ([f"{__name__}:model_with_inputs", "--seq", "8"], "--seq: .*takes no argument 'seq'"),
        (
            [f"{__name__}:model_with_inputs", "--html", "nowhere/x.html"],
            "--html nowhere/x.html: there is no folder nowhere",
        ),
        ([f"{__name__}:model_with_inputs", "--option", "parallel.rings=2"], "did you mean 'parallel.ring'?"),
        ([f"{__name__}:nothing_of_use"], "the factory should return model, .*not (int, int)"),
        (["nowhere/config.json"], "no such file"),
        ([f"{__name__}:model_with_inputs", "--dtype", "int8"], "--dtype int8: should be one of bf16"),
        ([f"{__name__}:model_with_inputs", "--option", "strict"], "should be key=value"),
        ([f"{__name__}:model_with_inputs", "--option", "strikt=true"], "did you mean 'strict'"),
        ([f"{__name__}:model_with_inputs", "--platform", "tpu"], "platform = 'tpu'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message):
    result = invoke("explain", *arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for part in message.split(".*"):
        assert part in lines[0]


@pytest.mark.slow
def test_a_config_is_explained_layer_by_layer(config):
    pytest.importorskip("transformers")
    arguments = ("explain", str(config), "--seq", "64", "--layers", "2", "--graph")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    for part in (
        "LlamaForCausalLM",
        "2 layers, batch 1, 64 tokens",
        "model.layers.*.self_attn  x2",
        f"2 x {FIA}",
    ):
        assert part in result.stdout
    assert FIA + "(" in result.stdout


def test_more_layers_than_the_config_has_are_refused(config):
    pytest.importorskip("transformers")
    result = invoke("explain", str(config), "--layers", "9")
    assert result.exit_code == 2
    assert "--layers 9: the config has 3 layers; give 1 to 3" in result.stderr


def test_a_config_that_transformers_does_not_know_is_refused(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    result = invoke("explain", str(tmp_path))
    assert result.exit_code == 2
    assert "not a config that transformers knows" in result.stderr


@pytest.mark.slow
def test_the_demo_fuses_every_attention_of_real_models():
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    result = invoke("demo", "--json", "--runs", "1")
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    assert [(m["model"], m["dtype"]) for m in measured] == [
        ("Llama", "float32"), ("Llama", "bfloat16"), ("Wan", "float32"), ("Wan", "bfloat16"),
    ]  # fmt: skip
    for found in measured:
        assert found["report"]["fused"] == len(found["report"]["sites"]) > 0
        assert found["error"] < (1e-4 if found["dtype"] == "float32" else 5e-2) * found["scale"]
    assert {timing["variant"] for timing in measured[0]["timings"]} == {"eager", "inductor", "sgl_npu"}
