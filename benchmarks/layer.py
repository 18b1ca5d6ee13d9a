"""One Llama attention layer written by hand: time and peak memory beside plain Inductor and a hand-called SDPA."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import median_seconds

HEADS, KV_HEADS, HEAD_SIZE = 16, 4, 64
LENGTHS = (512, 1024, 2048, 4096)
GPU_LENGTHS = (512, 2048, 8192, 16384)


class Layer(nn.Module):
    """Projections, rotary embedding, attention; (1, S, 1024) to the same. The mask is made from positions."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        size = HEADS * HEAD_SIZE
        self.query, self.out = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(size, KV_HEADS * HEAD_SIZE, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)
        q, k, v = (f(x).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = (_rotated(y, position) for y in (q, k))
        if self.by_hand:
            out = _attention_by_hand(q, k, v, position)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


def _rotated(x: Tensor, position: Tensor) -> Tensor:
    frequency = 1.0 / 10000 ** (torch.arange(0, HEAD_SIZE, 2, device=x.device) / HEAD_SIZE)
    angle = (position[:, None] * frequency).repeat(1, 2)
    half = torch.cat((-x[..., HEAD_SIZE // 2 :], x[..., : HEAD_SIZE // 2]), -1)
    return x * angle.cos().to(x.dtype) + half * angle.sin().to(x.dtype)


def _attention_by_hand(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    mask = torch.where(position <= position[:, None], 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    scores = q @ k.transpose(2, 3) * HEAD_SIZE**-0.5 + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@torch.no_grad()
def measure(dtype: torch.dtype, length: int, runs: int, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Median seconds and peak MB above what was held before the call, per variant; the variants take turns."""
    torch.manual_seed(0)
    by_hand = Layer(True).to(device, dtype).eval()
    sdpa = Layer(False).to(device, dtype).eval()
    sdpa.load_state_dict(by_hand.state_dict())
    x = torch.randn(1, length, HEADS * HEAD_SIZE, dtype=dtype, device=device)
    torch._dynamo.reset()
    compiled: dict[str, Callable[[Tensor], Tensor]] = {
        "inductor": torch.compile(by_hand),
        "sdpa": torch.compile(sdpa),
        "ours": torch.compile(by_hand, backend="sgl_npu", options={"strict": True}),
    }
    variants = {name: partial(run, x) for name, run in compiled.items()}
    expected = by_hand(x)
    for run in variants.values():
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(run(), expected, atol=tolerance, rtol=tolerance)
    seconds = median_seconds(variants, runs, calls=1 if device == "cpu" else 10)
    peak_mb = _peak_mb if device == "cpu" else _peak_mb_of_gpu
    return {name: (seconds[name], peak_mb(run)) for name, run in variants.items()}


def _peak_mb_of_gpu(run: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_mb(run: Callable[[], object]) -> float:
    """How far the resident memory of this process rises above what it was; 0 where the system does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what is needed
    reset.write_text("5")
    before = _kilobytes(status, "VmRSS")
    run()
    return (_kilobytes(status, "VmHWM") - before) / 1024


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))
