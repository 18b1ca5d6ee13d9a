"""`sgl-npu export` where torch_npu is missing or broken: the rewritten graph is written, the rest is explained."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from sgl_npu.compiler import export as exporting
from sgl_npu.compiler import export_compile, export_process, own_process
from sgl_npu.compiler.cli import app

FIA = "npu.npu_fused_infer_attention_score"
ASCEND_FILES = ["npugraph_ex_code.py", "ge_graph.py", "ge_graph.pbtxt"]

RUNS: list[torch.Size] = []


@torch.library.custom_op("test_export::count_runs", mutates_args=())
def count_runs(x: torch.Tensor) -> torch.Tensor:
    RUNS.append(x.shape)
    return x.clone()


@count_runs.register_fake
def _(x):
    return torch.empty_like(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(128, 384, dtype=torch.bfloat16)
        self.register_buffer("tril", torch.ones(96, 96, dtype=torch.bool).tril())

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        length = x.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.tril[:length, :length])
        return count_runs(out.transpose(1, 2).flatten(2))


class TwoGraphs(Layer):
    def forward(self, x):
        x = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(x)


INPUTS = {"x": torch.randn(3, 40, 128, dtype=torch.bfloat16)}


def layer():
    return Layer(), INPUTS


def layer_of_length(seq):
    return Layer(), {name: x[:, :seq] for name, x in INPUTS.items()}


def two_graphs():
    return TwoGraphs(), INPUTS


def length_marked():
    x = torch.randn(3, 40, 128, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 1)
    return Layer(), {"x": x}


def nothing_compiled():
    return torch.compiler.disable(Layer()), INPUTS


def cannot_run():
    return Layer(), {"x": torch.randn(3, 40, 100, dtype=torch.bfloat16)}


def invoke(factory, out, *arguments):
    torch._dynamo.reset()
    return CliRunner().invoke(app, ["export", f"{__name__}:{factory}", "--out", str(out), *arguments])


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def written(out):
    return [row["file"] for row in manifest(out)["files"]]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "a" / "new" / "folder"


# ---------------------------------------------------------------- what is written


def test_the_graph_and_the_report_are_written_without_torch_npu(out):
    result = invoke("layer", out, "--inner", "none")
    assert result.exit_code == 0, result.output
    assert written(out) == ["report.txt", "fx_graph.txt"]
    assert f"1 x {FIA}" in (out / "report.txt").read_text()
    assert f"{FIA}(" in (out / "fx_graph.txt").read_text()


def test_nothing_runs(out):
    RUNS.clear()
    assert invoke("two_graphs", out, "--inner", "none").exit_code == 0
    assert RUNS == []


def test_a_mask_is_proved_from_the_values_of_a_buffer(out):
    invoke("layer", out, "--inner", "none")
    assert "compared at every call: tril" in (out / "report.txt").read_text()


def test_every_graph_has_a_file_and_keeps_its_symbols(out):
    invoke("two_graphs", out, "--inner", "none")
    assert written(out) == ["report.txt", "fx_graph_0.txt", "fx_graph_1.txt"]
    for number in (0, 1):
        assert "bf16[3, 40, 128]" not in (out / f"fx_graph_{number}.txt").read_text()


@pytest.mark.parametrize(
    ("factory", "setting", "start"),
    [
        ("layer", "--dynamic", "bf16[s"),
        ("layer", "--static", "bf16[3, 40, 128]"),
        ("length_marked", "--dynamic", "bf16[3, s"),
    ],
)
def test_sizes_are_symbols_unless_static_or_marked_otherwise(out, factory, setting, start):
    invoke(factory, out, "--inner", "none", setting)
    lines = (out / "fx_graph.txt").read_text().splitlines()
    x = next(line for line in lines if line.startswith("input") and line.endswith(", 128]") and line.count(",") == 2)
    assert x.partition(": ")[2].startswith(start)


@pytest.mark.parametrize(
    ("arguments", "fused"), [([], True), (["--attention", "sdpa"], False), (["--option", "attention=sdpa"], False)]
)
def test_options_reach_the_backend(out, arguments, fused):
    invoke("layer", out, "--inner", "none", *arguments)
    assert (FIA in (out / "fx_graph.txt").read_text()) is fused


def test_the_manifest_says_how_it_was_made(out):
    invoke("layer_of_length", out, "--inner", "none", "--seq", "7", "--attention", "fa")
    found = manifest(out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["torch-npu"] is None
    assert (found["device"], found["seq"], found["dynamic"]) == ("cpu", 7, True)
    assert found["options"] == {"platform": "npu", "attention": "fa"}
    assert found["files"][0]["size"] == len((out / "report.txt").read_bytes())


def test_json_is_the_manifest(out):
    result = invoke("layer", out, "--inner", "none", "--json")
    assert json.loads(result.stdout) == manifest(out)


# ---------------------------------------------------------------- what is not, and why


@pytest.mark.parametrize(("inner", "files"), [("both", ASCEND_FILES), ("npugraph_ex", ASCEND_FILES[:1])])
def test_without_torch_npu_one_line_says_what_to_install(out, inner, files):
    result = invoke("layer", out, "--inner", inner)
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("not written"))
    assert line.startswith(f"not written: {', '.join(files)}: torch_npu is not installed; pip install torch-npu")
    assert result.stdout.count("not written") == len(files)
    assert written(out) == ["report.txt", "fx_graph.txt"]


def broken_torch_npu(tmp_path, monkeypatch):
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError('libascendcl.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)


def test_without_cann_the_line_says_how_to_get_it_or_stand_in_for_it(out, tmp_path, monkeypatch):
    broken_torch_npu(tmp_path, monkeypatch)
    result = invoke("layer", out)
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("not written"))
    for part in ("libascendcl.so: no such file", "set_env.sh", "-m stand_in --ge -m sgl_npu export"):
        assert part in line
    assert written(out) == ["report.txt", "fx_graph.txt"]


def test_a_library_that_stumbles_over_a_broken_torch_npu_gives_the_same_line(out, tmp_path, monkeypatch):
    broken_torch_npu(tmp_path, monkeypatch)
    (tmp_path / "stumbles.py").write_text("import torch_npu")
    monkeypatch.setattr(exporting, "load_target", lambda *_: __import__("stumbles"))
    result = invoke("layer", out)
    assert result.exit_code == 2
    assert "set_env.sh" in result.stderr


def test_a_call_without_a_graph_is_a_reason(out):
    result = invoke("nothing_compiled", out, "--inner", "none")
    assert result.exit_code == 1
    assert "not written: fx_graph.txt: no graph reached the backend" in result.stderr


def test_a_graph_that_fails_to_compile_leaves_the_others_their_numbers(out, monkeypatch):
    compile_graph, seen = export_compile.compile_graph, []

    def fails_once(*args):
        seen.append(args)
        if len(seen) == 1:
            raise RuntimeError("no such kernel")
        return compile_graph(*args)

    monkeypatch.setattr(export_compile, "compile_graph", fails_once)
    result = invoke("two_graphs", out, "--inner", "none")
    assert result.exit_code == 1
    assert "not written: fx_graph_0.txt: RuntimeError: no such kernel" in result.stderr
    assert written(out) == ["report.txt", "fx_graph_1.txt", "eager_error.txt"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.write(2, b'GE is lost'); os.abort()", "torchair ended by SIGABRT: GE is lost"),
        ("raise SystemExit(3)", "torchair ended with exit code 3"),
    ],
)
def test_a_compiler_that_ends_its_process_is_a_reason_with_a_log(out, monkeypatch, program, reason):
    monkeypatch.setattr(exporting, "why_not", lambda name: "")
    monkeypatch.setattr(export_process, "command", lambda *_: [sys.executable, "-c", program])
    result = invoke("layer", out, "--inner", "torchair")
    assert result.exit_code == 1
    assert f"not written: ge_graph.py, ge_graph.pbtxt: the process of {reason}" in result.stderr
    assert written(out) == ["report.txt", "fx_graph.txt", "torchair_error.txt"]


def test_an_error_in_the_other_process_is_a_reason_with_its_traceback(tmp_path):
    request = exporting.Request(f"{__name__}:cannot_run", str(tmp_path), {"platform": "npu"})
    asked, answered = tmp_path / "asked", tmp_path / "answered"
    asked.write_text(json.dumps({"part": "torchair", "request": vars(request)}))
    assert CliRunner().invoke(app, ["export-part", str(asked), str(answered)]).exit_code == 0
    dump, text, log = json.loads(answered.read_text())
    assert (dump["file"], text["file"]) == ("ge_graph.py", "ge_graph.pbtxt")
    assert dump["missing"] == text["missing"]
    assert "Dynamo failed to run FX node with fake tensors" in dump["missing"]
    assert log["file"] == "torchair_error.txt"
    assert "a and b must have same reduction dim" in (tmp_path / "torchair_error.txt").read_text()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inner", "inductor"], "--inner inductor: should be one of both, npugraph_ex, torchair, none"),
        (["--option", "inner=torchair"], "inner = 'torchair': export has --inner"),
        (["--dtype", "int8"], "--dtype int8: should be one of bf16"),
        (["--platform", "cpu"], "compiles for NPUs, but platform = 'cpu'"),
        (["--attention", "best"], "attention = 'best': input should be 'auto'"),
        (["--ring", "2"], "parallel: ring = 2 needs a process group, and there is none"),
        (["--ulysses", "2", "--kv-gather", "2"], "parallel: kv_gather = 2, ulysses = 2 needs a process group"),
        (["--option", "strikt=true"], "did you mean 'strict'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(out, arguments, message):
    result = invoke("layer", out, *arguments)
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert message in line
    assert not out.exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    result = invoke("layer", tmp_path / "taken")
    assert result.exit_code == 2
    assert "is a file; give a folder" in result.stderr


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    result = invoke("layer", tmp_path, "--inner", "none")
    assert result.exit_code == 2
    assert "the folder is not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_force_replaces_the_files_of_the_last_export_and_no_others(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    for factory in ("two_graphs", "layer"):
        assert invoke(factory, tmp_path, "--inner", "none", "--force").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fx_graph.txt", "manifest.json", "mine.txt", "report.txt",
    ]  # fmt: skip


# ---------------------------------------------------------------- a process of its own


@pytest.mark.parametrize(
    ("program", "start"),
    [
        (["python", "-m", "sgl_npu"], ["-m", "sgl_npu"]),
        (["python", "/usr/bin/sgl-npu"], ["/usr/bin/sgl-npu"]),
        (["python", "-X", "dev", "-m", "stand_in", "--ge", "-m", "sgl_npu"],
         ["-X", "dev", "-m", "stand_in", "--ge", "-m", "sgl_npu"]),
    ],
)  # fmt: skip
def test_another_process_starts_as_this_one_did(monkeypatch, program, start):
    monkeypatch.setattr(own_process, "_start", None)
    monkeypatch.setattr(own_process, "_arguments", None)
    monkeypatch.setattr(sys, "argv", ["sgl-npu", "export", "x:y"])
    monkeypatch.setattr(sys, "orig_argv", [*program, "export", "x:y"])
    own_process.remember_start()
    assert own_process.command("a", "b") == [sys.executable, *start, "a", "b"]
    assert own_process.arguments() == ["export", "x:y"]
