"""What stands between projections and attention is computed in their own order, (B, S, N, D); the answer stays."""

import pytest
import torch
import torch.nn.functional as F
from compiled_report import assert_same, compile_for, compiled, count, only_site
from torch import nn

import sgl_npu
from sgl_npu.compiler import pipeline

B, S, N, D = 2, 24, 4, 32
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


class Model(nn.Module):
    """Projections, `prepare` on query and key in (B, N, S, D), attention, output projection."""

    def __init__(self, prepare=lambda x, *_: x, kv_heads=N):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n * D) for n in (N, kv_heads, kv_heads))
        self.o = nn.Linear(N * D, 64)
        self.norm = nn.RMSNorm(D)
        self.layer_norm = nn.LayerNorm(D)
        self.prepare = prepare
        self.bfloat16()

    def heads(self, x):
        return [f(x).view(*x.shape[:2], -1, D).transpose(1, 2) for f in (self.q, self.k, self.v)]

    def finish(self, out):
        return self.o(out.transpose(1, 2).reshape(out.size(0), out.size(2), -1))

    def forward(self, x, *tables):
        q, k, v = self.heads(x)
        q, k = (self.prepare(t, *tables) for t in (self.normed(q), self.normed(k)))
        return self.finish(sdpa(q, k, v, is_causal=True, enable_gqa=True))

    def normed(self, x):
        return x


class RMSNormed(Model):
    def normed(self, x):
        return self.norm(x)


class LayerNormed(Model):
    def normed(self, x):
        return self.layer_norm(x)


class HandNormed(Model):
    def normed(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.norm.weight * y.to(x.dtype)


def rotate_half(x):
    return torch.cat((-x[..., x.size(-1) // 2 :], x[..., : x.size(-1) // 2]), -1)


def rotate_chunks(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rope(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def chunk_rope(x, cos, sin):
    return x * cos + rotate_chunks(x) * sin


def float_rope(x, cos, sin):
    return rope(x.float(), cos.float(), sin.float()).to(x.dtype)


def partial_by_slice(x, cos, sin):
    half = x.size(-1) // 2
    return torch.cat((rope(x[..., :half], cos[..., :half], sin[..., :half]), x[..., half:]), dim=-1)


def partial_by_split(x, cos, sin):
    turned, kept = torch.split(x, [8, x.size(-1) - 8], dim=-1)
    return torch.cat((kept, rope(turned, cos[..., :8], sin[..., :8])), dim=-1)


def tables(*lead):
    return rand(*lead, D), rand(*lead, D)


@pytest.fixture(autouse=True)
def _rotations_are_kept(monkeypatch):
    """What fuses them would hide how they were moved."""
    kept = tuple(step for step in pipeline.PASSES if step.name != "qkv_norm_rope")
    monkeypatch.setattr(pipeline, "PASSES", kept)


MOVED = {
    "nothing between": (Model(), ()),
    "a copy between": (Model(lambda x: x.contiguous()), ()),
    "rope, cos (S, D)": (Model(rope), tables(S)),
    "rope, cos (1, S, D)": (Model(rope), tables(1, S)),
    "rope, cos (1, 1, S, D)": (Model(rope), tables(1, 1, S)),
    "rope, cos (B, 1, S, D)": (Model(rope), tables(B, 1, S)),
    "rope, cos (B, S, D) unsqueezed": (Model(lambda x, c, s: rope(x, c.unsqueeze(1), s.unsqueeze(1))), tables(B, S)),
    "rope, cos unsqueezed from the right": (Model(lambda x, c, s: rope(x, c[:, None], s.unsqueeze(-3))), tables(B, S)),
    "rope by chunks": (Model(chunk_rope), tables(1, 1, S)),
    "rope in float32": (Model(float_rope), tables(1, 1, S)),
    "rope with grouped heads": (Model(rope, kv_heads=2), tables(S)),
    "partial rope by slices": (Model(partial_by_slice), tables(1, 1, S)),
    "partial rope by split": (Model(partial_by_split), tables(S)),
    "nn.RMSNorm, then rope": (RMSNormed(rope), tables(S)),
    "nn.LayerNorm, then rope": (LayerNormed(rope), tables(S)),
    "a norm by hand, then rope": (HandNormed(rope), tables(1, 1, S)),
    "permute for transpose": (Model(lambda x: x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) * 2), ()),
    "an empty cache": (Model(lambda x: torch.cat((x.new_empty(x.size(0), x.size(1), 0, D), x), 2)), ()),
}


@pytest.mark.parametrize("case", MOVED)
def test_no_transpose_and_no_copy_is_left_around_the_kernel(case):
    model, extra = MOVED[case]
    report = compiled(model, rand(B, S, 64), *extra)[0]
    assert only_site([report]).kernel == "ascend_fa"
    assert "input_layout=BSND," in report.graph
    assert [count(report, op) for op in ("aten.transpose", "aten.permute", "aten.clone")] == [0, 0, 0], report.graph


@pytest.mark.parametrize(
    "model, tables",
    [
        (Model(rope, kv_heads=1), tables(S)),
        (Model(lambda x, cos, sin: rope(x, cos.mT, sin.mT)), (rand(1, D, S), rand(1, D, S))),
        (Model(lambda x, cos, sin: rope(x, cos.mT, sin.mT)), (rand(D, S), rand(D, S))),
        (Model(lambda x, cos, sin: rope(x, cos.transpose(1, 2), sin.transpose(1, 2))), tables(1, S, 1)),
    ],
    ids=["one key head", "a table (1, D, S)", "a table (D, S)", "a table (1, S, 1, D)"],
)
def test_a_transpose_of_something_else_is_not_taken_for_the_one_of_heads(model, tables):
    report = compiled(model, rand(B, S, 64), *tables)[0]
    assert "input_layout=BSND," in report.graph
    assert count(report, "aten.clone") == 0


@pytest.mark.parametrize("rank", [2, 4])
def test_one_graph_serves_every_length_and_batch(rank):
    model, before = RMSNormed(rope, kv_heads=2), len(sgl_npu.reports())
    run = compile_for(model)
    for batch, length in ((2, 24), (3, 7), (5, 131), (2, 2)):
        x, cos, sin = rand(batch, length, 64), *tables(*(1,) * (rank - 2), length)
        torch._dynamo.mark_dynamic(x, (0, 1))
        for table in (cos, sin):
            torch._dynamo.mark_dynamic(table, rank - 2)
        with torch.no_grad():
            assert_same(run(x, cos, sin), model(x, cos, sin))
    assert len(sgl_npu.reports()) == before + 1
    assert count(sgl_npu.reports()[-1], "aten.transpose") == 0


def returned_key(q, k, v, cos, sin):
    k = rope(k, cos, sin)
    return sdpa(rope(q, cos, sin), k, v), k, v


def returned_contiguous_key(q, k, v, cos, sin):
    k = partial_by_slice(k, cos, sin)
    return sdpa(partial_by_slice(q, cos, sin), k, v), k, k.view(B * N, S, D)


def key_of_two_sites(q, k, v, cos, sin):
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    return sdpa(q, k, v), sdpa(q, k, v * 2, is_causal=True)


def key_used_halfway(q, k, v, cos, sin):
    scaled = k * cos
    return sdpa(rope(q, cos, sin), scaled + rotate_half(k) * sin, v), scaled.sum(1), scaled.flatten(2)


@pytest.mark.parametrize(
    "function, muls",
    [(returned_key, 4), (returned_contiguous_key, 4), (key_of_two_sites, 5), (key_used_halfway, 4)],
)
def test_what_others_use_too_is_computed_once_and_keeps_its_strides(function, muls):
    def from_projections(q, k, v, cos, sin):
        return function(*(x.transpose(1, 2) for x in (q, k, v)), cos, sin)

    inputs = [rand(B, S, N, D) for _ in range(3)]
    report = compiled(from_projections, *inputs, *tables(S))[0]
    assert "input_layout=BSND" in report.graph
    assert count(report, "aten.mul") == muls


def test_a_key_written_into_a_cache_is_computed_once():
    def with_cache(q, k, v, cos, sin, cache):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k = rope(k, cos, sin)
        cache.copy_(k)
        return sdpa(rope(q, cos, sin), k, v)

    inputs = [*(rand(B, S, N, D) for _ in range(3)), *tables(S)]
    cache, expected = torch.zeros(B, N, S, D, dtype=torch.bfloat16), torch.zeros(B, N, S, D, dtype=torch.bfloat16)
    run = compile_for(with_cache)
    assert_same(run(*inputs, cache), with_cache(*inputs, expected))
    assert_same(cache, expected)
    assert count(sgl_npu.reports()[-1], "aten.mul") == 4


def interleaved_rope(x, cos, sin):
    a, b = x.unflatten(-1, (D // 2, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin


def cached(q, k, v, cache):
    return sdpa(q, torch.cat((cache, k), 2), torch.cat((cache, v), 2))


def noisy(q, k, v):
    return sdpa(F.rrelu(q, 0.5, 0.5, training=True), k, v).contiguous()


def per_head_bias(q, k, v, weight):
    return sdpa(q + weight, k, v)


def softmax_over_rows(q, k, v):
    return sdpa(q.softmax(2), k.mean(2, keepdim=True) * k, v)


def summed_over_heads(q, k, v):
    return sdpa(q + q.sum(1, keepdim=True), k, v)


def normed_over_rows(q, k, v):
    return sdpa(F.layer_norm(q, (S, D)), k, v)


KEPT = {
    "a 5-D view": (lambda q, k, v, *t: sdpa(interleaved_rope(q, *t), interleaved_rope(k, *t), v), tables(S)),
    "a key-value cache in (B, N, S, D)": (cached, (rand(B, N, 7, D),)),
    "random numbers": (noisy, ()),
    "a table with heads and no batch": (per_head_bias, (rand(N, S, D),)),
    "a reduction over rows": (softmax_over_rows, ()),
    "a reduction over heads": (summed_over_heads, ()),
    "a norm over rows and dims": (normed_over_rows, ()),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_does_not_commute_with_the_transpose_keeps_its_order_and_its_answer(case):
    function, extra = KEPT[case]

    def from_projections(q, k, v, *extra):
        return function(*(x.transpose(1, 2) for x in (q, k, v)), *extra)

    report = compiled(from_projections, *(rand(B, S, N, D) for _ in range(3)), *extra)[0]
    assert only_site([report]).kernel == "ascend_fa"
    assert count(report, "aten.transpose") > 0


def by_unbind(x):
    return x.view(B, S, 3, N, D).permute(2, 0, 3, 1, 4).unbind(0)


def by_chunk(x):
    return [part.view(B, S, N, D).transpose(1, 2) for part in x.chunk(3, dim=-1)]


def by_split_after_view(x):
    return [part.squeeze(2).transpose(1, 2) for part in x.view(B, S, 3, N, D).split(1, dim=2)]


@pytest.mark.parametrize("with_rope", [False, True], ids=["bare", "rope"])
@pytest.mark.parametrize("unpack", [by_unbind, by_chunk, by_split_after_view])
def test_packed_projections_give_the_kernel_contiguous_tensors(unpack, with_rope):
    def attention(x, cos, sin):
        q, k, v = unpack(x)
        if with_rope:
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    report = compiled(attention, rand(B, S, 3 * N * D), *tables(S))[0]
    assert only_site([report]).kernel == "ascend_fa"
    assert count(report, "aten.clone") <= (1 if with_rope else 3)


def test_query_key_and_value_may_be_one_tensor():
    def attention(x, cos, sin):
        x = rope(x.transpose(1, 2), cos, sin)
        return sdpa(x, x, x)

    report = compiled(attention, rand(B, S, N, D), *tables(S))[0]
    assert count(report, "aten.mul") == 2


def test_decode_with_one_query_row_needs_no_transpose():
    def attention(q, k, v, cache):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = torch.cat((cache, k), 2), torch.cat((cache, v), 2)
        return sdpa(q * 2, k, v).transpose(1, 2).flatten(2)

    report = compiled(attention, *(rand(B, 1, N, D) for _ in range(3)), rand(B, N, 40, D))[0]
    assert "input_layout=BNSD," in report.graph
    assert count(report, "aten.clone") == 0
