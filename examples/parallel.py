"""One sequence on two ranks: a Llama that nobody prepared for it, against the same model on one.

torchrun --nproc-per-node 2 examples/parallel.py
"""

import sys

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import sgl_npu

TOLERANCE = 1e-5
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
)


def main() -> float:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same weights and the same inputs on every rank
    model = LlamaForCausalLM(CONFIG).eval()
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 1000))

    parallel = sgl_npu.Parallel(ring=dist.get_world_size())
    compiled = torch.compile(model, backend="sgl_npu", options={"parallel": parallel})
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        found = compiled(tokens, use_cache=False).logits  # all 1000 rows, on every rank

    error = (found - expected).abs().max().item()
    if dist.get_rank() == 0:
        print(sgl_npu.reports()[-1])
        print(f"error    {error:.1e} at most, against the model on one rank")
    dist.destroy_process_group()
    return error


if __name__ == "__main__":
    sys.exit(main() > TOLERANCE)
