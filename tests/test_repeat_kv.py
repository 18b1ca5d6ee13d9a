"""Key and value heads repeated for their query heads: every spelling is taken back, what looks alike is not."""

import pytest
import torch
import torch.nn.functional as F
from compiled_report import assert_same, compile_for, compiled, only_site

import sgl_npu

B, HKV, GROUP, S, D = 2, 2, 3, 10, 16
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


def transformers(x, n=GROUP):
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def view_instead_of_unsqueeze(x):
    b, h, s, d = x.shape
    return x.contiguous().view(b, h, 1, s, d).expand(b, h, GROUP, s, d).reshape(b, h * GROUP, s, d)


def llama_original(x):
    b, s, h, d = x.transpose(1, 2).shape
    wide = x.transpose(1, 2)[:, :, :, None, :].expand(b, s, h, GROUP, d).reshape(b, s, h * GROUP, d)
    return wide.transpose(1, 2)


SPELLINGS = {
    "unsqueeze, expand, reshape": transformers,
    "unsqueeze from the right": lambda x: x.unsqueeze(-3).expand(-1, -1, GROUP, -1, -1).flatten(1, 2),
    "a view puts the dimension in": view_instead_of_unsqueeze,
    "repeat_interleave(dim=1)": lambda x: x.repeat_interleave(GROUP, dim=1),
    "repeat_interleave(dim=-3)": lambda x: x.repeat_interleave(GROUP, -3),
    "torch.repeat_interleave, keywords": lambda x: torch.repeat_interleave(x, dim=1, repeats=GROUP),
    "torch.repeat_interleave in (B, S, N, D)": lambda x: torch.repeat_interleave(
        x.transpose(1, 2), dim=2, repeats=GROUP
    ).transpose(1, 2),
    "expand in (B, S, N, D)": llama_original,
    "a copy after it": lambda x: transformers(x).contiguous(),
    "a copy between transpose and repetition": lambda x: transformers(x.contiguous()),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_taken_back_to_the_heads_before_it(spelling, dynamic):
    repeat = SPELLINGS[spelling]

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa(q, repeat(k), repeat(v), is_causal=True)

    inputs = [rand(B, S, n, D) for n in (HKV * GROUP, HKV, HKV)]
    if dynamic:
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 1)
    reports = compiled(attention, *inputs)
    site = only_site(reports)
    assert (site.query[1], site.key[1], site.value[1]) == ("6", "2", "2")
    assert "num_key_value_heads=2" in reports[0].graph and "expand" not in reports[0].graph


def test_one_head_expanded_for_all_queries_is_taken_back():
    def attention(q, k, v):
        return sdpa(q, k.expand(-1, 6, -1, -1), v.expand(-1, 6, -1, -1))

    site = only_site(compiled(attention, rand(B, 6, S, D), rand(B, 1, S, D), rand(B, 1, S, D)))
    assert site.key[1] == site.value[1] == "1"


def test_a_repetition_of_a_repetition_composes_with_grouped_heads():
    def attention(q, k, v):
        return sdpa(q, transformers(k, 2), transformers(v, 2), enable_gqa=True)

    site = only_site(compiled(attention, rand(B, 8, S, D), rand(B, 2, S, D), rand(B, 2, S, D)))
    assert site.key[1] == "2"


def test_symbolic_batch_and_lengths_use_one_graph():
    def attention(q, k, v):
        return sdpa(q, transformers(k), transformers(v))

    run, before = compile_for(attention), len(sgl_npu.reports())
    for batch, rows, keys in ((3, 5, 10), (2, 17, 12), (5, 4, 63)):
        inputs = rand(batch, 6, rows, D), rand(batch, 2, keys, D), rand(batch, 2, keys, D)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, (0, 2))
        assert_same(run(*inputs), attention(*inputs))
    assert len(sgl_npu.reports()) == before + 1


def tile(x):
    return x.repeat(1, GROUP, 1, 1)


def tile_by_expand(x):
    return x.unsqueeze(1).expand(-1, GROUP, -1, -1, -1).flatten(1, 2)


def repeat_rows(x):
    return x.unsqueeze(3).expand(-1, -1, -1, GROUP, -1).reshape(B, HKV * GROUP, S, D)


LOOKALIKES = {
    "k.repeat puts head h at h % Hkv": (tile, tile),
    "the same by expand": (tile_by_expand, tile_by_expand),
    "another dimension widened, then folded into heads": (repeat_rows, repeat_rows),
    "only the key is repeated": (transformers, tile),
    "only the value is repeated": (tile, transformers),
}


def by_hand(query, key, value):
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    rows = torch.arange(query.shape[2])
    scores = (query @ key.transpose(2, 3) * 0.25).masked_fill(rows > rows[:, None], -1e9)
    return scores.softmax(-1) @ value


def test_a_batch_of_as_many_as_kv_heads_with_every_size_symbolic():
    """One symbol is both, so sizes of the scores have its square in them."""
    site = only_site(compiled(by_hand, *(torch.randn(2, heads, S, D) for heads in (4, 2, 2)), dynamic=True))
    assert (site.fused, site.mask, site.key[1]) == (True, "causal", site.key[0])


@pytest.mark.parametrize("lookalike", LOOKALIKES)
def test_what_only_looks_like_a_repetition_stays(lookalike):
    key, value = LOOKALIKES[lookalike]

    def attention(q, k, v):
        return sdpa(q, key(k), value(v))

    site = only_site(compiled(attention, rand(B, 6, S, D), rand(B, HKV, S, D), rand(B, HKV, S, D)))
    assert site.key[1] == site.value[1] == "6"


def test_different_factors_of_key_and_value_stay():
    def attention(q, k, v):
        return sdpa(q, transformers(k, 6), transformers(v, 3))

    site = only_site(compiled(attention, rand(B, 6, S, D), rand(B, 1, S, D), rand(B, 2, S, D)))
    assert site.key[1] == site.value[1] == "6"


def test_other_users_of_the_repeated_key_still_get_it():
    def attention(q, k, v):
        wide = transformers(k)
        return sdpa(q, wide, transformers(v)), wide, wide.sum(1)

    site = only_site(compiled(attention, rand(B, 6, S, D), rand(B, HKV, S, D), rand(B, HKV, S, D)))
    assert site.key[1] == "2"
