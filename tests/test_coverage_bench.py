"""The coverage benchmark: what it counts as attention, what it writes, and a few of its cases from end to end."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("einops")

import typer

from benchmarks.coverage import document as documents
from benchmarks.coverage.__main__ import main
from benchmarks.coverage.counting import count_sites
from benchmarks.coverage.document import document
from benchmarks.coverage.error import relative_error
from benchmarks.coverage.plain_blocks import CrossCovariance, Lucidrains, Router, SoftmaxPooling, TimmSwin
from benchmarks.coverage.registry import all_cases
from benchmarks.coverage.square_masks import SquareMasks
from benchmarks.coverage.summary import summary
from benchmarks.coverage.tiny import tiny_config


class TwoSites(nn.Module):
    """One attention with a mask, one without; a softmax over classes that is none."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(mask, -torch.inf)
        first = scores.softmax(-1) @ v
        second = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, first).softmax(-1), v)
        return self.head(second.transpose(1, 2).flatten(2)).softmax(-1)


def counted(model: nn.Module, *inputs: torch.Tensor):
    with torch.no_grad(), count_sites(model.parameters()) as counter:
        model(*inputs)
    return counter.counts()


def test_both_sites_of_a_hand_made_model_are_counted():
    found = counted(TwoSites(), torch.randn(3, 5, 16))
    assert found.handwritten == 2
    assert found.shapes == [[3, 2, 5, 5]] * 2


@pytest.mark.parametrize(
    "model", [CrossCovariance(), Router(), SoftmaxPooling()], ids=lambda model: type(model).__name__
)
def test_what_only_looks_like_attention_is_not_counted(model):
    assert counted(model, torch.randn(2, 24, 64)).handwritten == 0


@pytest.mark.parametrize("model", [Lucidrains(), TimmSwin()], ids=lambda model: type(model).__name__)
def test_copies_and_windows_do_not_hide_a_site(model):
    assert counted(model, torch.randn(2, 64, 64)).handwritten == 1


def test_attention_inside_an_sdpa_call_is_not_written_by_hand():
    class Call(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool))

    found = counted(Call(), torch.randn(2, 2, 5, 8))
    assert (found.handwritten, found.sdpa) == (0, 1)


def test_a_mask_made_of_positions_is_left_and_one_made_of_data_is_not():
    data = torch.randn(4, 6)
    with SquareMasks([data], [(4, 6)]) as masks:
        torch.ge(torch.arange(4)[:, None], torch.arange(6)[None])
        torch.ge(data, 0)
        torch.ones(1, 1).expand(4, 6)
    assert masks.found == ["aten::ge (4, 6) bool"]


def test_an_error_is_relative_to_the_largest_output_and_infinite_for_other_shapes():
    assert relative_error([torch.tensor([100.0, 1.0])], [torch.tensor([100.0, 0.0])]) == pytest.approx(0.01)
    assert relative_error([torch.zeros(2)], [torch.zeros(3)]) == math.inf
    assert relative_error([torch.tensor([math.nan])], [torch.zeros(1)]) == math.inf


def test_a_tiny_config_is_small_in_its_nested_configs_too():
    from transformers import CLIPConfig

    config = tiny_config(CLIPConfig, vision_config={"image_size": 16})
    assert (config.text_config.hidden_size, config.vision_config.num_hidden_layers) == (64, 2)
    assert config.vision_config.image_size == 16


def test_the_cases_cover_hundreds_of_families():
    cases = all_cases().values()
    assert len({(case.library, case.family) for case in cases}) >= 220
    assert len(cases) >= 390
    assert sum(case.negative for case in cases) >= 12


def record(case: str, found: int, count: int, **more):
    library, family, _ = case.split("/")
    made_with = {"backend": "sgl_npu", "platform": "cpu", "mode": "static", "dtype": "float32"}
    base = {"case": case, "library": library, "family": family, "status": "ok", "matched": found, "handwritten": count}
    extra = {
        "sdpa": 0,
        "max_rel": 1e-7,
        "versions": "2030-01-01, torch 9.9",
        "seq": 64,
        "batch": 2,
        "sites": [],
        "negative": False,
    }
    return {**base, **extra, **made_with, **more}


REFUSED = {"mask": "", "fused": False, "kernel": "", "refusals": [["match", "the scores come from 'cat'"]]}


def test_the_page_lists_every_exception_with_its_reason():
    runs = [
        record("hf/b/eager", 2, 2),
        record("hf/a/eager", 1, 2, sites=[REFUSED]),
        record("hf/c/eager", 2, 2, status="numeric", max_rel=0.5),
        record("hf/b/eager", 1, 2, backend="inductor", sites=[{**REFUSED, "mask": "band(-3, 0)"}]),
        record("hf/patchtst/eager", 0, 2, status="compile_error", error="RuntimeError: view\nsize"),
        record("plain/n/eager", 0, 0, negative=True, reported_matched=1),
    ]
    page = document(runs)
    assert page == document(reversed(runs)), "the order of the records does not matter"
    assert "Made with: 2030-01-01, torch 9.9, seq 64, batch 2." in page
    assert "| hf/a/eager | static | 1 of 2 | the scores come from 'cat' |" in page
    assert "| hf/c/eager | static | 2 of 2 | error 5.0e-01 |" in page
    assert "compile_error: RuntimeError: view; plain aot_eager has it too; under Inductor it compiles" in page
    assert "| family | static | Inductor static | masks |" in page
    assert "| hf/b | 2 of 2 | 1 of 2 | window |" in page
    assert "| hand-written sites found | 5 of 8 | 1 of 2 |" in page
    assert "| plain/n | 1 |  |" in page


def test_a_summary_says_how_much_was_found():
    text = summary([record("hf/a/eager", 1, 2), {"case": "hf/b/eager", "status": "timeout", "negative": False}])
    assert text == "2 cases of 2 families: 1 ok, 1 timeout\nhand-written sites found: 1 of 2"


def run(*arguments: str):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def test_an_unknown_mode_is_one_line():
    found = run("--mode", "fast")
    assert found.exit_code == 2
    assert "'fast': choose from static, dynamic, mark-dynamic" in found.output


CASES = {
    "plain/nanogpt/eager": 1,
    "plain/sdpa_grouped/sdpa": 0,
    "plain/cross_covariance/eager": 0,
    "hf/llama/eager": 2,
    "hf/llama/eager+pad": 2,
    "hf/llama/eager+decode": 2,
    "hf/bert/eager": 2,
    "hf/t5/eager": 6,
}


@pytest.mark.slow
def test_representative_cases_run_from_end_to_end(tmp_path, monkeypatch):
    lines = tmp_path / "run.jsonl"
    pattern = "^(" + "|".join(name.replace("+", r"\+") for name in CASES) + ")$"
    found = run("--only", pattern, "--seq", "24", "--json", str(lines))
    assert found.exit_code == 0, found.output
    records = {item["case"]: item for item in map(json.loads, lines.read_text().splitlines())}
    assert {name: item["handwritten"] for name, item in records.items()} == CASES
    for name, item in records.items():
        assert item["status"] == "ok", item
        if not item["negative"]:
            assert item["matched"] == CASES[name]
            assert item["graph_breaks"] == 0
    assert records["hf/llama/eager"]["sites"][0]["mask"] == "causal"
    assert "tensor" in records["hf/llama/eager+pad"]["sites"][0]["mask"]
    assert records["plain/sdpa_grouped/sdpa"]["sdpa"] == 1
    page = tmp_path / "coverage_bf16.md"
    monkeypatch.setattr("benchmarks.coverage.__main__.DOCS", tmp_path)
    assert run("--write-docs", str(lines), "--page", page.name).exit_code == 0
    assert page.read_text() == documents.document(records.values())
