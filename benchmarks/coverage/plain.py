"""Plain PyTorch: attention as it is written by hand outside of the model libraries, and what only looks like it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage import plain_blocks as blocks
from benchmarks.coverage.case import Built, Case, Setting
from benchmarks.coverage.inputs import padding_mask
from benchmarks.coverage.plain_blocks import Projected

WIDTH = 64
Inputs = Callable[[Setting], dict[str, Any]]


@dataclass(frozen=True)
class Plain:
    family: str
    sites: int
    model: Callable[[], nn.Module]
    inputs: Inputs
    spelling: str = "eager"
    negative: bool = False


def tokens(s: Setting, **extra: Tensor) -> dict[str, Tensor]:
    return {"x": torch.randn(s.batch, s.seq, 64), **extra}


def lower(s: Setting) -> Tensor:
    return torch.ones(s.seq, s.seq, dtype=torch.bool).tril()[None, None]


def scores(s: Setting) -> Tensor:
    return torch.randn(s.batch, 1, s.seq, s.seq)


def pad(s: Setting) -> Tensor:
    return padding_mask(s, s.seq, left=False).bool()


def _with_mask(make: Callable[[Setting], Tensor]) -> Inputs:
    return lambda s: tokens(s, m=make(s))


def _cached(s: Setting) -> dict[str, Tensor]:
    past = (torch.randn(s.batch, 4, s.seq, 16) for _ in range(2))
    return {"x": torch.randn(s.batch, 1, 64), **dict(zip(("pk", "pv"), past, strict=True))}


def _map(s: Setting) -> dict[str, Tensor]:
    return {"x": torch.randn(s.batch, 64, 8, 8)}


def _time_first(s: Setting) -> dict[str, Tensor]:
    return {"x": torch.randn(s.seq, s.batch, 64), "key_padding_mask": ~pad(s)}


def scaled(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def einsum_heads_last(q, k, v):
    return torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25).softmax(-1), v)


def einsum_causal(q, k, v):
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    m = torch.triu(torch.full((q.shape[1], q.shape[1]), float("-inf")), 1)
    return torch.einsum("bhqk,bkhd->bqhd", (s + m).softmax(-1), v)


def einsum_grouped(q, k, v):
    b, h, s, d = q.shape
    q = q.view(b, k.shape[1], h // k.shape[1], s, d)
    p = (torch.einsum("bgnsd,bgtd->bgnst", q, k) * 0.25).softmax(-1)
    return torch.einsum("bgnst,bgtd->bgnsd", p, v).reshape(b, h, s, d)


def baddbmm(q, k, v, m=None):
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))
    base = torch.empty(b * h, s, k.shape[1], dtype=q.dtype) if m is None else m.expand(b, h, s, s).reshape(b * h, s, s)
    w = torch.baddbmm(base, q, k.transpose(-1, -2), beta=0 if m is None else 1, alpha=d**-0.5)
    return torch.bmm(w.softmax(-1), v).view(b, h, s, d)


def sink_column(q, k, v, m):
    w = torch.cat([scaled(q, k), m.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], -1)
    return (w - w.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def sink_gate(q, k, v, m):
    w = scaled(q, k)
    gate = (torch.logsumexp(w, -1) - m.view(1, -1, 1)).sigmoid()
    return (w.softmax(-1) @ v) * gate[..., None]


def off_by_one(q, k, v):
    w = scaled(q, k)
    top = w.amax(-1, keepdim=True).clamp(min=0)
    e = (w - top).exp()
    return (e / (e.sum(-1, keepdim=True) + (-top).exp())) @ v


def manual_softmax(q, k, v):
    e = torch.exp((w := scaled(q, k)) - w.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def deferred_division(q, k, v):
    e = torch.exp((w := scaled(q, k)) - w.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


def repeated(q, k, v):
    return scaled(q, k.repeat_interleave(2, 1)).softmax(-1) @ v.repeat_interleave(2, 1)


def expanded(q, k, v):
    b, n, s, d = k.shape
    k, v = (t[:, :, None].expand(b, n, 2, s, d).reshape(b, n * 2, s, d) for t in (k, v))
    return scaled(q, k).softmax(-1) @ v


def tiled(q, k, v):
    return scaled(q, k.repeat(1, 2, 1, 1)).softmax(-1) @ v.repeat(1, 2, 1, 1)


def window(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return scaled(q, k).masked_fill((j > i) | (i - j >= 16), float("-inf")).softmax(-1) @ v


def two_sided(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return torch.where((i - j).abs() <= 8, scaled(q, k), -1e4).softmax(-1) @ v


def clipped(q, k, v):
    return scaled(q, k).clamp(-5, 5).softmax(-1) @ v


def cached(q, k, v, pk, pv):
    return scaled(q, torch.cat([pk, k], 2)).softmax(-1) @ torch.cat([pv, v], 2)


def chunked(q, k, v):
    return torch.cat([scaled(part, k).softmax(-1) @ v for part in q.chunk(4, 2)], 2)


def by_head(q, k, v):
    return torch.stack([scaled(q[:, h], k[:, h]).softmax(-1) @ v[:, h] for h in range(4)], 1)


def guarded(q, k, v, m):
    p = scaled(q, k).masked_fill(~m[:, None, None], float("-inf")).softmax(-1)
    return torch.nan_to_num(p, 0.0) @ v


def zeroed(q, k, v, m):
    away = ~m[:, None, None]
    return scaled(q, k).masked_fill(away, -1e9).softmax(-1).masked_fill(away, 0.0) @ v


def product_mask(q, k, v, m):
    outer = (m[:, :, None] & m[:, None, :])[:, None]
    return torch.where(outer, scaled(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v


def linear_attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))


def efficient_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


def performer(q, k, v):
    features = torch.linspace(-1, 1, 256).view(16, 16)
    q, k = (torch.exp(t @ features - t.square().sum(-1, keepdim=True) / 2) for t in (q, k))
    return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2)[..., None])


def sigmoid_attention(q, k, v):
    return (scaled(q, k) - math.log(k.shape[2])).sigmoid() @ v


def relu_attention(q, k, v):
    return F.relu(scaled(q, k)) / k.shape[2] @ v


def axis_softmax(q, k, v):
    return scaled(q, k).softmax(-2) @ v


def _formula(formula: Callable, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: Projected(formula, **kwargs)


def _sdpa(**kwargs: Any) -> Callable:
    def call(q, k, v, m=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m, **kwargs)

    return call


class _Torch(nn.Module):
    """A module of torch.nn on the tokens, fast path off."""

    def __init__(self, module: nn.Module, call: Callable) -> None:
        super().__init__()
        torch.backends.mha.set_fastpath_enabled(False)
        self.module, self.call = module, call

    def forward(self, x: Tensor, **extra: Tensor) -> Tensor:
        return self.call(self.module, x, **extra)


def _mha(**kwargs: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(64, 4, batch_first=True, **kwargs)


def _layer(kind: type) -> nn.Module:
    return kind(64, 4, 128, batch_first=True)


GROUPED = {"kv_heads": 2}
LAST = {"heads_last": True}

ROWS = (
    Plain("vanilla_div", 1, _formula(lambda q, k, v: scaled(q, k).softmax(-1) @ v), tokens),
    Plain("vanilla_mul", 1, _formula(lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v), tokens),
    Plain("query_scaled", 1, _formula(lambda q, k, v: ((q * 0.25) @ k.mT).softmax(-1) @ v), tokens),
    Plain("both_scaled", 1, _formula(lambda q, k, v: ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v), tokens),
    Plain("unscaled", 1, _formula(lambda q, k, v: F.softmax(torch.matmul(q, k.mT), -1).matmul(v)), tokens),
    Plain("add_mask", 1, _formula(lambda q, k, v, m: (scaled(q, k) + m).softmax(-1) @ v), _with_mask(scores)),
    Plain("add_mask_float32", 1,
          _formula(lambda q, k, v, m: F.softmax(q @ k.mT * 0.25 + m, -1, dtype=torch.float32).to(q.dtype) @ v),
          _with_mask(scores)),
    Plain("fill_mask", 1, _formula(lambda q, k, v, m: scaled(q, k).masked_fill(~m, -torch.inf).softmax(-1) @ v),
          _with_mask(lower)),
    Plain("where_mask", 1, _formula(lambda q, k, v, m: torch.where(m, scaled(q, k), -1e9).softmax(-1) @ v),
          _with_mask(lower)),
    Plain("float_mask_arithmetic", 1,
          _formula(lambda q, k, v, m: (scaled(q, k) + (1.0 - m[:, None, None].float()) * -10000.0).softmax(-1) @ v),
          _with_mask(pad)),
    Plain("padding_guarded", 1, _formula(guarded), _with_mask(pad)),
    Plain("padding_zeroed", 1, _formula(zeroed), _with_mask(pad)),
    Plain("padding_outer", 1, _formula(product_mask), _with_mask(pad)),
    Plain("window", 1, _formula(window), tokens),
    Plain("window_two_sided", 1, _formula(two_sided), tokens),
    Plain("softcap", 1, _formula(lambda q, k, v: (torch.tanh(scaled(q, k) / 30) * 30).softmax(-1) @ v), tokens),
    Plain("clipped", 1, _formula(clipped), tokens),
    Plain("sink_column", 1, _formula(sink_column), lambda s: tokens(s, m=torch.randn(4))),
    Plain("sink_gate", 1, _formula(sink_gate), lambda s: tokens(s, m=torch.randn(4))),
    Plain("softmax_off_by_one", 0, _formula(off_by_one), tokens),
    Plain("softmax_written_out", 0, _formula(manual_softmax), tokens),
    Plain("softmax_divided_later", 0, _formula(deferred_division), tokens),
    Plain("einsum_heads_last", 1, _formula(einsum_heads_last, **LAST), tokens),
    Plain("einsum_causal", 1, _formula(einsum_causal, **LAST), tokens),
    Plain("einsum_grouped", 1, _formula(einsum_grouped, **GROUPED), tokens),
    Plain("baddbmm", 1, _formula(baddbmm), tokens),
    Plain("baddbmm_mask", 1, _formula(baddbmm), _with_mask(scores)),
    Plain("grouped_repeat_interleave", 1, _formula(repeated, **GROUPED), tokens),
    Plain("grouped_expand", 1, _formula(expanded, **GROUPED), tokens),
    Plain("grouped_tiled", 1, _formula(tiled, **GROUPED), tokens),
    Plain("multi_query_broadcast", 1, _formula(lambda q, k, v: scaled(q, k).softmax(-1) @ v, kv_heads=1), tokens),
    Plain("cached_decode", 1, _formula(cached), _cached),
    Plain("chunked_queries", 4, _formula(chunked), tokens),
    Plain("head_by_head", 4, _formula(by_head), tokens),
    Plain("cross", 1, _formula(lambda q, k, v: scaled(q, k).softmax(-1) @ v),
          lambda s: tokens(s, context=torch.randn(s.batch, 24, 64))),
    Plain("nanogpt", 1, blocks.NanoGPT, tokens),
    Plain("gpt2_openai", 1, blocks.MinGPTConv, tokens),
    Plain("annotated_transformer", 1, blocks.AnnotatedTransformer,
          lambda s: tokens(s, mask=torch.ones(s.seq, s.seq).tril()[None])),
    Plain("llama_reference", 1, blocks.LlamaReference, tokens),
    Plain("lucidrains_vit", 1, blocks.Lucidrains, tokens),
    Plain("lucidrains_palm", 1, blocks.LucidrainsPaLM, tokens),
    Plain("x_transformers", 1, blocks.XTransformers, lambda s: tokens(s, mask=pad(s))),
    Plain("x_transformers_cosine", 1, lambda: blocks.XTransformers(cosine=True), tokens),
    Plain("x_transformers_memory", 1, lambda: blocks.XTransformers(memories=4), tokens),
    Plain("einops_einsum", 1, blocks.EinopsEinsum, tokens),
    Plain("t5_style", 1, blocks.T5Style, tokens),
    Plain("transformer_xl", 1, blocks.TransformerXL, lambda s: tokens(s, positions=torch.randn(s.seq, 64))),
    Plain("conformer_relative", 1, blocks.ConformerRelative, tokens),
    Plain("fairseq_mha", 1, blocks.FairseqMHA, _time_first),
    Plain("timm_vit", 1, blocks.TimmViT, tokens),
    Plain("timm_vit_qk_norm", 1, lambda: blocks.TimmViT(qk_norm=True), tokens),
    Plain("timm_swin", 1, blocks.TimmSwin, lambda s: {"x": torch.randn(s.batch, 64, 64)}),
    Plain("timm_levit", 1, blocks.TimmLevit, lambda s: {"x": torch.randn(s.batch, 64, 64)}),
    Plain("timm_cait_class", 1, blocks.TimmCait, tokens),
    Plain("conv_attention", 1, blocks.ConvAttention, _map),
    Plain("conv_attention_heads", 1, lambda: blocks.ConvAttention(4), _map),
    Plain("set_transformer_pool", 1, blocks.PoolByAttention, tokens),
    Plain("sdpa", 1, _formula(_sdpa()), tokens, "sdpa"),
    Plain("sdpa_causal", 1, _formula(_sdpa(is_causal=True)), tokens, "sdpa"),
    Plain("sdpa_grouped", 1, _formula(_sdpa(is_causal=True, enable_gqa=True), **GROUPED), tokens, "sdpa"),
    Plain("sdpa_bool_mask", 1, _formula(_sdpa()), _with_mask(lower), "sdpa"),
    Plain("sdpa_float_mask", 1, _formula(_sdpa()), _with_mask(scores), "sdpa"),
    Plain("sdpa_scale", 1, _formula(_sdpa(scale=0.3)), tokens, "sdpa"),
    Plain("torch_mha", 1, lambda: _Torch(_mha(), lambda m, x: m(x, x, x, need_weights=False)[0]), tokens, "sdpa"),
    Plain("torch_mha_padding", 1,
          lambda: _Torch(_mha(), lambda m, x, p: m(x, x, x, key_padding_mask=p, need_weights=False)[0]),
          lambda s: tokens(s, p=~pad(s)), "sdpa"),
    Plain("torch_encoder", 1, lambda: _Torch(_layer(nn.TransformerEncoderLayer), lambda m, x: m(x)), tokens, "sdpa"),
    Plain("torch_decoder", 2, lambda: _Torch(_layer(nn.TransformerDecoderLayer), lambda m, x: m(x, x)), tokens, "sdpa"),
    Plain("talking_heads", 0, blocks.TalkingHeads, tokens, negative=True),
    Plain("cross_covariance", 0, blocks.CrossCovariance, tokens, negative=True),
    Plain("linear_attention", 0, _formula(linear_attention), tokens, negative=True),
    Plain("efficient_attention", 0, _formula(efficient_attention), tokens, negative=True),
    Plain("performer", 0, _formula(performer), tokens, negative=True),
    Plain("sigmoid_attention", 0, _formula(sigmoid_attention), tokens, negative=True),
    Plain("relu_attention", 0, _formula(relu_attention), tokens, negative=True),
    Plain("softmax_over_queries", 0, _formula(axis_softmax), tokens, negative=True),
    Plain("moe_router", 0, blocks.Router, tokens, negative=True),
    Plain("soft_moe", 0, blocks.SoftMoE, tokens, negative=True),
    Plain("squeeze_excite", 0, blocks.SqueezeExcite, _map, negative=True),
    Plain("softmax_pooling", 0, blocks.SoftmaxPooling, tokens, negative=True),
    Plain("gated_linear_unit", 0, blocks.GatedLinearUnit, tokens, negative=True),
    Plain("soft_labels", 0, blocks.Classifier, tokens, negative=True),
)  # fmt: skip


def cases() -> list[Case]:
    return [
        Case("plain", row.family, row.spelling, _builder(row), sites=row.sites, negative=row.negative) for row in ROWS
    ]


def _builder(row: Plain) -> Callable[[Setting], Built]:
    def build(setting: Setting) -> Built:
        torch.manual_seed(0)
        model = row.model().eval().to(setting.dtype)
        # A length that is the width is one size to torch.compile, and the width is fixed.
        kwargs = row.inputs(replace(setting, seq=setting.seq + 8) if setting.seq == WIDTH else setting)
        mask = kwargs.get("m")
        valid = mask if mask is not None and mask.dim() == 2 else None
        return Built(
            model, {name: x.to(setting.dtype) if x.is_floating_point() else x for name, x in kwargs.items()}, valid
        )

    return build
