"""A pipeline of diffusers whose transformer is compiled in place: the same video as before, on one rank or on several.

python examples/diffusers_pipeline.py
torchrun --nproc-per-node 2 examples/diffusers_pipeline.py

The pipeline is Wan's, small and random: nothing is downloaded, and the prompt comes as embeddings.
"""

import argparse
import sys
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

import sgl_npu
from sgl_npu.integrations.diffusers import DenoisingSteps

TOLERANCE = 1e-4
TEXT = 32


def build() -> WanPipeline:
    """The same weights wherever it is called."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), scheduler=scheduler, transformer=transformer.eval()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe: WanPipeline, **kwargs: Any) -> torch.Tensor:
    """(frames, channels, height, width) of the same prompt and the same noise, in 4 steps with guidance."""
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randn(1, 16, TEXT, generator=draw)
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=torch.zeros_like(prompt),
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=4,
        generator=draw,
        output_type="pt",
        **kwargs,
    ).frames[0]


def main(inner: str = "auto") -> float:
    options: dict[str, Any] = {"inner": inner}
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        options["parallel"] = sgl_npu.Parallel(ulysses=dist.get_world_size())

    pipe = build()
    expected = video(pipe)
    pipe.transformer.compile(backend="sgl_npu", options=options)
    # A sparse attention wants to know the step; a dense one does not mind.
    found = video(pipe, callback_on_step_end=DenoisingSteps())

    error = (found - expected).abs().max().item()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(sgl_npu.reports()[-1])
        print(f"error    {error:.1e} at most, against the pipeline that is not compiled")
    if dist.is_initialized():
        dist.destroy_process_group()
    return error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner", default="auto", help="who compiles the rewritten graph; eager: nobody, at once")
    sys.exit(main(parser.parse_args().inner) > TOLERANCE)
