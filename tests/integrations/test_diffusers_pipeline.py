"""examples/diffusers_pipeline.py: a pipeline gives the same video with its transformer compiled in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgl_npu
from examples import diffusers_pipeline as example
from sgl_npu.integrations.diffusers import DenoisingSteps

EXAMPLE = Path(example.__file__)
RAIN = {
    "attention": "rain_fusion_attn",
    "attention_config": {"sparsity": 0.5, "skip_first_steps": 2, "layers": "blocks.*.attn1"},
}


@pytest.mark.parametrize("platform", ["cpu", "npu"])
def test_the_video_is_that_of_the_pipeline_that_is_not_compiled(platform):
    torch._dynamo.reset()
    pipe, before = example.build(), len(sgl_npu.reports())
    expected = example.video(pipe)
    assert expected.shape == (9, 3, 64, 64) and expected.std() > 0.01
    pipe.transformer.compile(backend="sgl_npu", options={"platform": platform, "inner": "eager", "strict": True})
    torch.testing.assert_close(example.video(pipe), expected, rtol=0, atol=example.TOLERANCE)
    (report,) = sgl_npu.reports()[before:]  # one graph for the prompt and for the guidance, in every step
    sgl_npu.expect(report, fused="all")
    assert [site.module.rpartition(".")[2] for site in report.sites] == ["attn1", "attn2"] * 2


def test_the_step_callback_says_when_a_pipeline_turns_sparse(monkeypatch):
    """48 tokens are less than a block, so nothing is left out of them: the graphs that ran are what tells."""
    torch._dynamo.reset()
    pipe, before = example.build(), len(sgl_npu.reports())
    expected = example.video(pipe)
    pipe.transformer.compile(backend="sgl_npu", options={"inner": "eager", "strict": True, **RAIN})
    seen = []

    def record(pipe, step, timestep, kwargs):
        seen.append(sgl_npu.runtime.denoising.current_step())
        return kwargs

    found = example.video(pipe, callback_on_step_end=DenoisingSteps(record))
    torch.testing.assert_close(found, expected, rtol=0, atol=example.TOLERANCE)
    assert seen == [1, 2, 3, 4]
    (report,) = sgl_npu.reports()[before:]
    assert [graph.kind for graph in report.graphs] == ["inference", "inference, dense"]
    assert [site.op for site in report.sites if site.module.endswith("attn1")] == ["sgl_npu.block_attention"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_runs_alone_and_under_torchrun(ranks):
    launch = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launch, str(EXAMPLE), "--inner", "eager"]
    setting = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=setting, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "at most, against the pipeline that is not compiled" in done.stdout
    assert ("sequence sharded over 1 x 2 ranks" in done.stdout) == (ranks == 2)
