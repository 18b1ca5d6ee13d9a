"""The code of pages of docs/ that leaves models, inputs and pipelines to the reader."""

from __future__ import annotations

import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from capture.recording_driver import RecordingDriver
from page_code import code_blocks
from sparse.sparse_cases import small_wan, wan_inputs
from torch import nn

import sgl_npu
from sgl_npu.compiler.explain_target import Setting, load_target

DOCS = Path(__file__).parents[1] / "docs"


class Decoder(nn.Module):
    """Logits from tokens, positions and the slots and blocks of a cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions, self.head = nn.Embedding(20, 8), nn.Embedding(50, 8), nn.Linear(8, 20)

    def forward(self, input_ids, position_ids, slots, block_table):
        rows = self.tokens(input_ids) + self.positions(position_ids) * (slots >= 0)[..., None]
        return self.head(rows + block_table.sum(1)[:, None, None])


def test_captured_graphs(monkeypatch):
    def inputs(batch, tokens):
        ids = torch.randint(0, 20, (batch, tokens))
        return {
            "input_ids": ids,
            "position_ids": torch.arange(tokens).expand(batch, -1),
            "slots": torch.arange(batch * tokens).view(batch, -1),
            "block_table": torch.arange(batch * 3).view(batch, 3),
        }

    torch._dynamo.reset()
    (code,) = code_blocks(DOCS / "capture.md")
    given, model = inputs(3, 1), Decoder()
    names = {"model": model, "example": inputs(8, 4)}
    names |= dict(zip(("ids", "positions", "slots", "table"), given.values(), strict=True))
    # A CPU has no graphs: a driver that records stands for one that has.
    monkeypatch.setattr(sgl_npu, "GraphRunner", partial(sgl_npu.GraphRunner, driver=RecordingDriver()))
    exec(compile(code, "capture.md", "exec"), names)
    assert names["runner"].statistics.replays == 1
    torch.testing.assert_close(names["logits"], model(**given))


def test_a_function_that_export_is_given(monkeypatch):
    (code,) = code_blocks(DOCS / "export.md")
    page = types.ModuleType("page_of_export")
    vars(page).update(torch=torch, Model=lambda: nn.Identity())
    exec(compile(code, "export.md", "exec"), vars(page))
    monkeypatch.setitem(sys.modules, "page_of_export", page)
    target = load_target("page_of_export:build", Setting())
    assert target.kwargs["x"]._dynamo_dynamic_indices == {1}


@pytest.mark.slow
@torch.no_grad()
def test_sparse_attention_in_a_pipeline(tmp_path, monkeypatch):
    inputs = wan_inputs(4, 16, 16)

    class Pipeline:
        transformer = small_wan(layers=1)

        def __call__(self, prompt, callback_on_step_end):
            for step in range(11):
                self.results = [*getattr(self, "results", []), self.transformer(**inputs)[0]]
                callback_on_step_end(self, step, None, {})

    pipe = Pipeline()
    dense = pipe.transformer(**inputs)[0]
    torch._dynamo.reset()
    pipeline, quality = code_blocks(DOCS / "sparse.md")
    exec(compile(pipeline, "sparse.md", "exec"), {"torch": torch, "pipe": pipe, "prompt": ""})
    assert [torch.allclose(x, dense, atol=1e-5) for x in pipe.results] == [True] * 10 + [False]

    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "sgl_npu": sgl_npu, "transformer": small_wan(layers=1), "inputs": inputs}
    exec(compile(quality, "sparse.md, quality", "exec"), names)
    assert 0 < names["found"].density < 1 and list(tmp_path.glob("*.svg"))
