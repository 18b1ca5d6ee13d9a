# ruff: noqa: E501
"""Terms that are added to scores whose rows and keys are cut into the rows and columns of a picture."""

import pytest
import torch
from compiled_report import compile_for, compiled, only_site
from expecttest import assert_expected_inline

import sgl_npu

BATCH, HEADS, SIZE = 2, 3, 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(height=3, width=5, keys=None, dtype=torch.float32):
    """Query, key and value of (batches and heads, places, size); a row per side of the picture and place of a query."""
    high, wide = keys or (height, width)
    rows, count = BATCH * HEADS, height * width
    query, key, value = (torch.randn(rows, n, SIZE).to(dtype) for n in (count, high * wide, high * wide))
    by_height = torch.randn(rows, height, width, high).to(dtype)
    by_width = torch.randn(rows, height, width, wide).to(dtype)
    return query, key, value, by_height, by_width


def cut(query, key, by_height, by_width):
    """Scores in pieces: (batches and heads, height, width, height of keys, width of keys)."""
    scores = (query * SIZE**-0.5) @ key.transpose(1, 2)
    return scores.view(*by_height.shape, by_width.size(-1))


def one_after_the_other(query, key, value, by_height, by_width):
    scores = cut(query, key, by_height, by_width)
    scores = scores + by_height[..., None] + by_width[..., None, :]
    return scores.view(query.size(0), query.size(1), -1).softmax(-1) @ value


def the_sum_of_both(query, key, value, by_height, by_width):
    scores = cut(query, key, by_height, by_width) + (by_height[..., None] + by_width[..., None, :])
    return scores.flatten(3).flatten(1, 2).softmax(-1) @ value


def term_first_and_scaled(query, key, value, by_height, by_width):
    scores = by_height.unsqueeze(4) + cut(query, key, by_height, by_width) * 2
    return ((scores - by_width.unsqueeze(3)) / 2).reshape(*query.shape[:2], -1).softmax(-1) @ value


def upcast(query, key, value, by_height, by_width):
    scores = cut(query, key, by_height, by_width).float() + by_height.float()[..., None]
    return scores.reshape(*query.shape[:2], -1).softmax(-1).to(value.dtype) @ value


def keys_alone_in_pieces(query, key, value, by_height, by_width):
    scores = (query @ key.transpose(1, 2)).unflatten(-1, (by_height.size(-1), by_width.size(-1)))
    scores = scores + by_height.flatten(1, 2)[..., None] + by_width.flatten(1, 2)[..., None, :]
    return scores.flatten(2).softmax(-1) @ value


SPELLINGS = [one_after_the_other, the_sum_of_both, term_first_and_scaled, upcast, keys_alone_in_pieces]


@pytest.mark.parametrize("platform", ["cpu", "npu"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_one_site_with_a_bias(spelling, platform):
    site = only_site(compiled(spelling, *inputs(keys=(4, 2)), platform=platform))
    assert site.fused and site.mask == "full + bias"


def test_in_half_precision():
    site = only_site(compiled(one_after_the_other, *inputs(keys=(4, 2), dtype=torch.bfloat16)))
    assert site.op == "npu.npu_fused_infer_attention_score"


@pytest.mark.parametrize("spelling", [one_after_the_other, keys_alone_in_pieces])
def test_one_graph_serves_pictures_of_any_size(spelling):
    before = len(sgl_npu.reports())
    function = compile_for(spelling, dynamic=True)
    for sizes in ((3, 5), (4, 7), (9, 2)):
        given = inputs(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(function(*given), spelling(*given), atol=2e-5, rtol=2e-5)
    (report,) = sgl_npu.reports()[before:]
    assert report.sites[0].fused


def sizes_as_operands(query, key, value, by_height, by_width):
    scores = cut(query, key, by_height, by_width) * query.size(1) + by_height[..., None] / by_width.size(3)
    return (
        torch.add(scores, by_width[..., None, :], alpha=by_height.size(1)).flatten(3).flatten(1, 2).softmax(-1) @ value
    )


def in_channels_last(query, key, value, by_height, by_width):
    scores = cut(query, key, by_height, by_width).flatten(3).to(torch.float64, memory_format=torch.channels_last)
    scores = scores + by_height.repeat_interleave(by_width.size(-1), -1)
    return scores.flatten(1, 2).softmax(-1).to(value.dtype) @ value


@pytest.mark.parametrize("spelling", [sizes_as_operands, in_channels_last])
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_cannot_be_moved_changes_nothing(spelling, dynamic):
    only_site(compiled(spelling, *inputs(), platform="cpu", dynamic=dynamic))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_in_pieces_may_be_what_the_softmax_reads(dtype):
    def one_head_of_keys(query, key, bias, value):
        scores = (query @ key.mT).view(2, -1, 6) + bias
        return scores.to(dtype).softmax(-1).to(value.dtype) @ value

    shapes = ((2, 3, 5, 8), (2, 1, 6, 8), (2, 15, 6), (2, 6, 8))
    site = only_site(compiled(one_head_of_keys, *(torch.randn(shape) for shape in shapes), platform="cpu"))
    assert site.fused == (dtype == torch.float32) or site.refusals


def rows_and_columns_swapped(query, key, value, by_height, by_width):
    scores = cut(query, key, by_height, by_width) + by_height[..., None]
    return scores.transpose(3, 4).reshape(*query.shape[:2], -1).softmax(-1) @ value


def used_in_pieces_too(query, key, value, by_height, by_width):
    scores = cut(query, key, by_height, by_width) + by_height[..., None]
    return scores.reshape(*query.shape[:2], -1).softmax(-1) @ value, scores.amax((3, 4))


def normalised_in_pieces(query, key, value, by_height, by_width):
    scores = cut(query, key, by_height, by_width) + by_height[..., None]
    return scores.softmax(-1).reshape(*query.shape[:2], -1) @ value


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (rows_and_columns_swapped, "the scores are reshaped or transposed so that rows and keys are not"),
        (used_in_pieces_too, "the scores are reshaped or transposed so that rows and keys are not"),
        (normalised_in_pieces, "the scores are reshaped or transposed so that rows and keys are not"),
    ],
)
def test_what_is_something_else_stays(function, reason):
    site = only_site(compiled(function, *inputs()))
    assert not site.fused and reason in site.refusals[0][1]


def test_the_graph():
    report = compiled(one_after_the_other, *inputs(), platform="cpu")[-1]
    assert_expected_inline(
        report.graph,
        """\
input: f32[6, 15, 8]
input1: f32[6, 15, 8]
input2: f32[6, 3, 5, 3]
input3: f32[6, 3, 5, 5]
input4: f32[6, 15, 8]
mul: f32[6, 15, 8] = aten.mul.Tensor(input, 0.353553391)
unsqueeze: f32[6, 3, 5, 3, 1] = aten.unsqueeze(input2, 4)
expand: f32[6, 3, 5, 3, 5] = aten.expand(unsqueeze, [6, 3, 5, 3, 5])
clone: f32[6, 3, 5, 3, 5] = aten.clone(expand, memory_format=contiguous_format)
unsafe_view: f32[6, 15, 15] = aten._unsafe_view(clone, [6, 15, 15])
unsqueeze1: f32[6, 3, 5, 1, 5] = aten.unsqueeze(input3, 3)
expand1: f32[6, 3, 5, 3, 5] = aten.expand(unsqueeze1, [6, 3, 5, 3, 5])
clone1: f32[6, 3, 5, 3, 5] = aten.clone(expand1, memory_format=contiguous_format)
unsafe_view1: f32[6, 15, 15] = aten._unsafe_view(clone1, [6, 15, 15])
view: f32[6, 1, 15, 8] = aten.view(mul, [6, 1, 15, 8])
view1: f32[6, 1, 15, 8] = aten.view(input1, [6, 1, 15, 8])
view2: f32[6, 1, 15, 8] = aten.view(input4, [6, 1, 15, 8])
view3: f32[6, 15, 15] = aten.view(unsafe_view1, [6, 15, 15])
expand2: f32[6, 15, 15] = aten.expand(view3, [6, 15, 15])
view4: f32[6, 1, 15, 15] = aten.view(expand2, [6, 1, 15, 15])
view5: f32[6, 15, 15] = aten.view(unsafe_view, [6, 15, 15])
expand3: f32[6, 15, 15] = aten.expand(view5, [6, 15, 15])
view6: f32[6, 1, 15, 15] = aten.view(expand3, [6, 1, 15, 15])
add: f32[6, 1, 15, 15] = aten.add.Tensor(view4, view6)
scaled_dot_product_flash_attention_for_cpu: tuple = aten._scaled_dot_product_flash_attention_for_cpu(view, view1, view2, attn_mask=add, scale=1)
getitem: f32[6, 1, 15, 8] = getitem(scaled_dot_product_flash_attention_for_cpu, 0)
view7: f32[6, 15, 8] = aten.view(getitem, [6, 15, 8])
return [view7]""",
    )
