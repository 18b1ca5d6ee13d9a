# ruff: noqa: E501
"""FlexAttention on NPU: mask_mod and score_mod read as mask, band, bias and softcap; elsewhere it is Inductor's."""

import re

import pytest
import torch
from compiled_report import TOLERANCES, compile_for, compiled, count, only_site
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)

import sgl_npu

BF16, FP32 = torch.bfloat16, torch.float32
HEADS, KV_HEADS, ROWS, KEYS, DIM = 4, 2, 24, 40, 64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(rows=ROWS, keys=ROWS, dtype=BF16, batch=2, heads=HEADS, kv_heads=KV_HEADS, dim=DIM):
    shapes = (batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def blocks(mask_mod, rows=ROWS, keys=ROWS, batch=2, heads=None):
    return create_block_mask(mask_mod, batch, heads, rows, keys, device="cpu")


def causal(b, h, i, j):
    return i >= j


def prefix(b, h, i, j):
    return j < 5


def window(width):
    return lambda b, h, i, j: i - j < width


def of_documents(ids):
    return lambda b, h, i, j: ids[b, i] == ids[b, j]


def attend(score_mod=None, **options):
    """The block mask is an argument: a BlockMask made outside the graph."""

    def run(query, key, value, block_mask=None):
        return flex_attention(query + 1, key, value, score_mod, block_mask, enable_gqa=True, **options)

    return run


def site_of(run, *args, **settings):
    return only_site(compiled(run, *args, **settings))


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "mask_mod, mask, kernel",
    [
        (None, "full", "ascend_fa"),
        (causal, "causal", "ascend_fa"),
        (and_masks(causal, window(7)), "band(-6, 0)", "ascend_fa"),
        (lambda b, h, i, j: (i - j).abs() <= 3, "band(-3, 3)", "ascend_fa"),
        (or_masks(causal, prefix), "prefix", "ascend_fa"),
        (lambda b, h, i, j: i // 8 == j // 8, "chunks", "ascend_fa"),
        (lambda b, h, i, j: (i >= j) & (h != 1), "causal & tensor", None),
        (lambda b, h, i, j: j >= b * 3, "tensor", "ascend_fa"),
    ],
    ids=["none", "causal", "window", "both sides", "prefix", "chunks", "of a head", "of a batch"],
)
def test_masks(mask_mod, mask, kernel):
    given = [] if mask_mod is None else [blocks(mask_mod, heads=HEADS)]
    site = site_of(attend(), *qkv(), *given)
    assert (site.spelling, site.mask) == ("flex_attention", mask), site.refusals
    assert kernel in (None, site.kernel), site.refusals


def test_an_offset_of_queries_to_keys_is_causal_from_the_bottom_right():
    def decode(b, h, i, j):
        return i + (KEYS - ROWS) >= j

    site = site_of(attend(), *qkv(keys=KEYS), blocks(decode, keys=KEYS))
    assert (site.kernel, site.mask) == ("ascend_fa", "causal (bottom-right)")


def test_documents_are_packed():
    ids = torch.tensor([[0] * 10 + [1] * 14, [4] * 3 + [2] * 21])
    reports = compiled(attend(), *qkv(), blocks(and_masks(causal, of_documents(ids))))
    assert (only_site(reports).kernel, only_site(reports).mask) == ("ascend_packed", "causal & documents")
    assert "input_layout=TND" in reports[0].graphs[0].text


def test_documents_that_are_not_packed_say_why():
    def run(query, key, value):
        ids = query[:, 0, :, 0].long()
        return flex_attention(query, key, value, block_mask=blocks(of_documents(ids)), enable_gqa=True)

    site = site_of(run, *qkv())
    assert site.kernel == "ascend_fa" and "a few ops on the integers" in dict(site.refusals)["documents"]


def test_rows_without_a_key_are_zero():
    site = site_of(attend(return_lse=True), *qkv(), blocks(lambda b, h, i, j: (i > 5) & (i >= j)))
    assert site.fused and site.empty_rows in ("some", "possible")


def test_a_mask_made_in_the_graph_takes_no_memory():
    def run(query, key, value):
        block_mask = create_block_mask(causal, None, None, query.size(2), key.size(2), device=query.device)
        return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)

    (report,) = compiled(run, *qkv())
    assert report.sites[0].mask == "causal" and count(report, "aten.ge") == 0 and count(report, "aten.sort") == 0


# ---------------------------------------------------------------- scores

SLOPES = torch.exp2(-torch.arange(1, HEADS + 1) * 2.0)
TABLE = torch.randn(HEADS, 2 * ROWS)


@pytest.mark.parametrize(
    "score_mod, mask",
    [
        (lambda s, b, h, i, j: s, "full"),
        (lambda s, b, h, i, j: s * 0.5, "full"),
        (lambda s, b, h, i, j: s / 4, "full"),
        (lambda s, b, h, i, j: 20 * torch.tanh(s / 20), "full"),
        (lambda s, b, h, i, j: torch.tanh(s * 2), "full"),
        (lambda s, b, h, i, j: s + SLOPES[h] * (j - i), "full + bias"),
        (lambda s, b, h, i, j: s - (i - j).abs() * 0.1, "full + bias"),
        (lambda s, b, h, i, j: TABLE[h, j - i + ROWS] + s, "full + bias"),
        (lambda s, b, h, i, j: s + SLOPES[h] * j - 0.5 * i, "full + bias"),
        (lambda s, b, h, i, j: s + (j - i), "full + bias"),
        (lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")), "causal"),
        (
            lambda s, b, h, i, j: torch.where(i >= j, 5 * torch.tanh(s / 5) + SLOPES[h] * j, -float("inf")),
            "causal + bias",
        ),
    ],
    ids=["same", "times", "over", "softcap", "tanh", "alibi", "minus", "table", "two", "integers", "mask", "all"],
)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_score_mods(score_mod, mask, dtype):
    site = site_of(attend(score_mod), *qkv(dtype=dtype), blocks(lambda b, h, i, j: j >= 0))
    assert (site.spelling, site.mask, bool(site.kernel)) == ("flex_attention", mask, True), site.refusals


def in_place_sum(score, b, h, i, j):
    score = score * 0.5
    score += SLOPES[h] * j
    return score


def in_place_score(score, b, h, i, j):
    score += SLOPES[h] * j
    return score


def forgotten_result(score, b, h, i, j):
    product = score * 0.5
    product.mul_(2)
    return product


def other_name(score, b, h, i, j):
    same = score = score * 0.5
    score += SLOPES[h] * j
    return same


def in_place_bias(score, b, h, i, j):
    distance = j - i
    distance.abs_()
    return score - distance * 0.1


def in_place_mask(score, b, h, i, j):
    kept = i >= j
    kept.logical_not_()
    return torch.where(kept, score, -float("inf"))


def copied_bias(score, b, h, i, j):
    bias = torch.zeros_like(j, dtype=FP32)
    bias.copy_(0.1 * j)
    return score + bias


@pytest.mark.parametrize("score_mod", [in_place_sum, in_place_score])
def test_a_sum_may_be_written_in_place(score_mod):
    assert site_of(attend(score_mod), *qkv()).mask == "full + bias"


BYTES = torch.full((ROWS,), 100, dtype=torch.int8)


@pytest.mark.parametrize(
    "score_mod, dtype",
    [
        (lambda s, b, h, i, j: s + (i > j) + (j > 3), FP32),
        (lambda s, b, h, i, j: s - (i > j).to(torch.uint8), FP32),
        (lambda s, b, h, i, j: s + (SLOPES[h] * j).bfloat16() + (SLOPES[h] * i).half(), FP32),
        (lambda s, b, h, i, j: s + BYTES[i] + torch.where(j < 5, 100, 0).to(torch.int8), BF16),
    ],
    ids=["bools", "uint8", "halves", "int8"],
)
def test_what_is_added_is_added_in_the_dtype_of_scores(score_mod, dtype):
    assert site_of(attend(score_mod), *qkv(dtype=dtype)).mask == "full + bias"


def test_autocast_leaves_mask_and_scores_alone():
    places = torch.randn(ROWS, 16)

    def run(*args):
        with torch.autocast("cpu", BF16):
            return attend(lambda s, b, h, i, j: s + torch.dot(places[i], places[j]))(*args)

    assert site_of(run, *qkv(dtype=FP32)).mask == "full + bias"


@pytest.mark.parametrize("batch, rows", [(0, ROWS), (2, 0)])
def test_no_batch_and_no_rows(batch, rows):
    site = site_of(attend(lambda s, b, h, i, j: s + SLOPES[h] * j), *qkv(rows, batch=batch))
    assert "capture" not in dict(site.refusals)


def test_a_number_that_is_known_at_run_time_only_is_left_alone():
    def run(query, key, value):
        length = query.size(2)
        return flex_attention(query, key, value, lambda s, b, h, i, j: s + length, enable_gqa=True)

    assert "score_mod" in dict(site_of(run, *qkv(), dynamic=True).refusals)["capture"]


ORDERS = {
    "columns": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "tokens, batch, heads": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "heads, batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "tokens, heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("value_dim", [DIM, 32])
@pytest.mark.parametrize("order", ORDERS)
def test_the_result_has_the_strides_of_torchs_own(order, value_dim):
    def run(query, key, value):
        return flex_attention(query, key, value, enable_gqa=True)

    query, key, value = qkv()
    assert site_of(run, ORDERS[order](query), key, value[..., :value_dim]).kernel


@pytest.mark.parametrize(
    "score_mod",
    [
        forgotten_result,
        other_name,
        in_place_bias,
        in_place_mask,
        copied_bias,
        lambda s, b, h, i, j: s + SLOPES.double()[h] * j,
        lambda s, b, h, i, j: s * 1e35,
        lambda s, b, h, i, j: torch.stack([s, s * 2]).sum(),
        lambda s, b, h, i, j: torch.where(i >= j, SLOPES[h], s),
        lambda s, b, h, i, j: 1e-35 * torch.tanh(s),
        lambda s, b, h, i, j: s * s,
        lambda s, b, h, i, j: (s + SLOPES[h]) * 2,
        lambda s, b, h, i, j: 2 / s,
        lambda s, b, h, i, j: SLOPES[h] - s,
        lambda s, b, h, i, j: s * SLOPES[h],
        lambda s, b, h, i, j: torch.tanh(s + SLOPES[h]),
        lambda s, b, h, i, j: torch.where(s > 0, s, -float("inf")),
        lambda s, b, h, i, j: torch.where(i >= j, s, -1e4),
        lambda s, b, h, i, j: torch.where(i >= j, -float("inf"), s),
        lambda s, b, h, i, j: (j - i) * 0.1,
        lambda s, b, h, i, j: torch.relu(s),
    ],
)
def test_other_score_mods_are_left_alone(score_mod):
    site = site_of(attend(score_mod), *qkv(), blocks(causal))
    assert not site.kernel and "score_mod" in dict(site.refusals)["capture"]


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
@pytest.mark.parametrize("sizes", [{}, {"rows": 1}, {"keys": 1}, {"batch": 1}, {"kv_heads": HEADS}, {"dim": 80}])
def test_sizes_and_dtypes(sizes, dtype):
    rows, keys = sizes.get("rows", ROWS), sizes.get("keys", ROWS)
    tensors = qkv(**sizes, dtype=dtype)
    site = site_of(attend(scale=0.2), *tensors, blocks(causal, rows, keys, tensors[0].size(0)))
    assert site.kernel, site.refusals


def test_one_batch_of_keys_serves_all_queries():
    query, key, value = qkv()
    assert site_of(attend(), query, key[:1], value[:1], blocks(causal)).kernel == "ascend_fa"


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_lse(dtype):
    def run(*args):
        out, aux = attend(return_aux=AuxRequest(lse=True))(*args)
        return out, aux.lse

    site = site_of(run, *qkv(dtype=dtype), blocks(causal))
    assert site.fused and site.lse_used, site.refusals


def test_autocast():
    def run(*args):
        with torch.autocast("cpu", BF16):
            return attend()(*args)

    query, key, value = qkv(dtype=FP32)
    site = site_of(run, query, key, value, blocks(causal))
    assert (site.kernel, site.dtype) == ("ascend_fa", "bfloat16")


def test_a_mask_in_lists_alone_is_left_to_torch():
    """Eager torch does not read the lists."""
    count, index = torch.ones(2, 1, 1, dtype=torch.int32), torch.zeros(2, 1, 1, 1, dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(count, index, seq_lengths=(ROWS, ROWS))
    site = site_of(attend(), *qkv(), block_mask)
    assert not site.kernel and "lists could mask" in dict(site.refusals)["capture"]


def test_a_program_of_torch_export_takes_it():
    class Model(nn.Module):
        def forward(self, query, key, value):
            return flex_attention(query, key, value, lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))

    tensors = tuple(qkv(kv_heads=HEADS))
    report = sgl_npu.explain(Model(), *tensors, options={"platform": "npu"})
    assert [(site.kernel, site.mask) for site in report.sites] == [("ascend_fa", "causal")]


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("inside", [True, False], ids=["mask made inside", "mask given"])
def test_one_graph_serves_all_lengths_of_two_blocks_and_more(inside):
    """A BlockMask of one block is another graph for every backend: torch takes sizes of 1 for constants."""

    def run(x, block_mask=None):
        if block_mask is None:
            block_mask = create_block_mask(causal, 2, None, x.size(2), x.size(2), device=x.device)
        return flex_attention(x, x[:, :2] + 1, x[:, 2:] * 2, block_mask=block_mask, enable_gqa=True)

    before, on_npu = len(sgl_npu.reports()), compile_for(run, dynamic=True)
    for length in (700, 200, 390, 1000):  # the first is not as many blocks as anything else has entries
        given = [qkv(length)[0], *([] if inside else [blocks(causal, length, length)])]
        with torch.no_grad():
            torch.testing.assert_close(on_npu(*given), run(*given), atol=4e-2, rtol=4e-2)
    assert only_site(sgl_npu.reports()[before:]).mask == "causal"


# ---------------------------------------------------------------- elsewhere


def test_without_an_npu_it_is_inductors():
    site = site_of(attend(), *qkv(), blocks(causal), platform="cpu")
    assert (site.op, site.fused, site.kernel) == ("flex_attention", True, "")


def test_the_report_names_the_line_of_the_model():
    site = site_of(attend(), *qkv(), blocks(causal))
    assert re.fullmatch(r"test_capture_flex\.py:\d+", site.source)


def test_golden_graph():
    (report,) = compiled(attend(lambda s, b, h, i, j: s * 0.5), *qkv(), blocks(and_masks(causal, window(7))))
    lines = [line for line in report.graphs[0].text.splitlines() if not line.startswith("input")]
    assert_expected_inline(
        "\n".join(lines),
        """\
add: bf16[2, 4, 24, 64] = aten.add.Tensor(input, 1)
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(add, input1, input2, atten_mask=triu, num_heads=4, scale=0.0625, pre_tokens=6, next_tokens=0, input_layout=BNSD, num_key_value_heads=2, sparse_mode=4)
getitem: bf16[2, 4, 24, 64] = getitem(npu_fused_infer_attention_score, 0)
return [getitem]""",
    )


# ---------------------------------------------------------------- random

CONDITIONS = {
    "causal": causal,
    "window": window(9),
    "ahead": lambda b, h, i, j: j - i <= 4,
    "prefix": prefix,
    "chunks": lambda b, h, i, j: i // 8 == j // 8,
    "head": lambda b, h, i, j: (h + j) % 3 != 0,
    "batch": lambda b, h, i, j: j >= 2 * b,
    "even": lambda b, h, i, j: (i + j) % 2 == 0,
}


@given(
    names=st.lists(st.sampled_from(sorted(CONDITIONS)), min_size=1, max_size=3),
    joined=st.lists(st.booleans(), min_size=2, max_size=2),
    score=st.sampled_from([None, "softcap", "bias", "mask"]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3)),
    lse=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_random_calls(names, joined, score, sizes, lse):
    mask_mod = CONDITIONS[names[0]]
    for name, both in zip(names[1:], joined, strict=False):
        mask_mod = (and_masks if both else or_masks)(mask_mod, CONDITIONS[name])
    score_mod = {
        None: None,
        "softcap": lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0),
        "bias": lambda s, b, h, i, j: s + SLOPES[h] * (j - i),
        "mask": lambda s, b, h, i, j: torch.where(i + 3 >= j, s * 2, -float("inf")),
    }[score]
    rows, keys, batch = sizes
    run = attend(score_mod, return_lse=lse)
    args = [*qkv(rows, keys, FP32, batch), blocks(mask_mod, rows, keys, batch, HEADS)]
    with torch.no_grad():
        found, expected = compile_for(run)(*args), run(*args)
    torch.testing.assert_close(found, expected, atol=TOLERANCES[FP32], rtol=TOLERANCES[FP32])
