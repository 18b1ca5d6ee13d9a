"""The grid of the tokens of an attention: found in the graphs of real models, said by the user, or refused."""

from __future__ import annotations

import copy
import functools
import warnings
from unittest import mock

import pytest
import torch
from sequence.model_cases import CASES, Inputs
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.coverage.case import Setting
from benchmarks.coverage.diffusion import cases
from sgl_npu.compiler import pipeline
from sgl_npu.lowering.sparse.token_grid import GridSetting, TokenGrid
from sgl_npu.passes.grid_evidence import GridEvidence
from sgl_npu.passes.site import Refusal, find_sites
from sgl_npu.passes.token_grid import find_grid
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sizes import hint, known

NO_GRID = "nothing in the graph says what frames, rows and columns the tokens have"
CROSS = "a grid is that of tokens which attend each other"


# Real models, as the backend sees them.

TEXT = 24
# What each attention of a model is over: a grid with the tokens before and after it, or the words of its refusal.
MODELS = {
    "Wan": [(3, 4, 8, 0, 0), CROSS, (3, 4, 8, 0, 0), CROSS],
    "HunyuanVideo": [NO_GRID, (3, 4, 8, 0, TEXT), (3, 4, 8, 0, TEXT)],
    "CogVideoX": [(3, 4, 8, 22, 0)] * 2,
    "LTX": [(2, 4, 4, 0, 0), CROSS, (2, 4, 4, 0, 0), CROSS],
    "QwenImage": [(1, 8, 8, TEXT, 0)] * 2,
    "SD3": [(1, 8, 8, 0, TEXT)] * 2,
    "Flux": [NO_GRID] * 2,
}
LATENTS = {"Wan": ((1, 2, 2), 0, None), "HunyuanVideo": ((1, 1, 1), TEXT, 0), "SD3": ((1, 2, 2), TEXT, 0)}


def graphs_of(model, inputs, dynamic):
    """Graphs with their sites, as they are when a sparse kernel is chosen: rotary embeddings stay in them."""
    found = []

    def keep(gm, context):
        graph = copy.deepcopy(gm.graph)
        found.append((graph, find_sites(graph, context.records)))

    names = [step.name for step in pipeline.PASSES]
    before = [step for step in pipeline.PASSES[: names.index("select")] if step.name != "qkv_norm_rope"]
    passes = (*before, pipeline.Pass("keep", keep))
    options = {"platform": "npu", "inner": "eager", "strict": True}
    torch._dynamo.reset()
    with mock.patch.object(pipeline, "PASSES", passes), torch.no_grad():
        torch.compile(model, backend="sgl_npu", options=options, dynamic=dynamic)(**inputs)
    return found


@functools.cache
def graph_of(name, dynamic=None):
    if name in CASES:
        case = CASES[name]
        model, inputs = case.build(), case.inputs(Inputs(*case.sizes[0]))
    else:
        model, inputs = from_coverage(name.lower())
    ((graph, sites),) = graphs_of(model, inputs, dynamic)
    return graph, sites


def from_coverage(family):
    built = next(case for case in cases() if case.family == family).build(Setting())
    return built.model, built.kwargs


def answers(name, dynamic=None, setting=None):
    graph, sites = graph_of(name, dynamic)
    evidence = GridEvidence()
    return [find_grid(graph, site, setting or GridSetting(), evidence) for site in sites]


def agrees(answer, expected):
    """Whether an answer is the expected one for the sizes at hand."""
    if isinstance(expected, str):
        return isinstance(answer, Refusal) and expected in answer.reason
    sizes = (answer.frames, answer.height, answer.width, answer.before, answer.after)
    return tuple(map(hint, sizes)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dynamic", [*((name, None) for name in MODELS), *((name, True) for name in MODELS if name != "Flux")]
)
def test_the_grid_of_every_attention_of_a_model_is_found_or_refused(name, dynamic):
    found = answers(name, dynamic)
    for answer, expected in zip(found, MODELS[name], strict=True):
        assert agrees(answer, expected), (answer, expected)
    if dynamic:
        assert all(isinstance(x.width, torch.SymInt) for x in found if isinstance(x, TokenGrid))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "Flux"])
def test_the_length_of_a_grid_is_that_of_the_attention_in_symbols(name):
    for site, grid in zip(graph_of(name, True)[1], answers(name, True), strict=True):
        assert isinstance(grid, Refusal) or known(grid.length == site.tensor("query").size(2))


@pytest.mark.slow
def test_flux_has_no_grid_but_the_one_that_is_said():
    for answer in answers("Flux"):
        assert "latent_shape" in answer.reason and "patch_size" in answer.reason
    for answer in answers("Flux", setting=GridSetting(latent_shape=(1, 8, 8), text_len=TEXT)):
        assert agrees(answer, (1, 8, 8, TEXT, 0)) and answer.source == "latent_shape"
    for answer in answers("Flux", setting=GridSetting(patch_size=(1, 2, 2), text_len=TEXT)):
        assert agrees(answer, "patch_size = (1, 2, 2): the graph has no input (B, C, T, H, W) or (B, C, H, W)")


@pytest.mark.slow
@pytest.mark.parametrize("name", LATENTS)
def test_a_patch_size_and_the_latent_input_give_what_the_graph_gives(name):
    patch, text, prefix = LATENTS[name]
    for answer, expected in zip(
        answers(name, setting=GridSetting(patch_size=patch, text_len=text, prefix=prefix)), MODELS[name], strict=True
    ):
        assert agrees(answer, "120 tokens, but the attention has 24" if expected is NO_GRID else expected)


@pytest.mark.slow
def test_a_patch_size_gives_symbols_where_the_latent_has_them():
    grid, cross, *_ = answers("Wan", True, GridSetting(patch_size=(1, 2, 2)))
    assert agrees(grid, (3, 4, 8, 0, 0)) and agrees(cross, CROSS)
    assert isinstance(grid.frames, torch.SymInt) and isinstance(grid.width, torch.SymInt)


@pytest.mark.slow
def test_a_shape_that_is_said_wins_where_it_fits_and_is_refused_with_its_numbers_where_not():
    refiner, *joint = answers("HunyuanVideo", setting=GridSetting(latent_shape=(2, 6, 8), text_len=TEXT, prefix=0))
    assert refiner.reason == "latent_shape = (2, 6, 8) with text_len = 24 is 120 tokens, but the attention has 24"
    assert all(agrees(x, (2, 6, 8, 0, TEXT)) for x in joint)
    for answer in answers("HunyuanVideo", setting=GridSetting(latent_shape=(2, 6, 8)))[1:]:
        assert agrees(answer, "latent_shape = (2, 6, 8) with text_len = 0 is 96 tokens, but the attention has 120")
    for answer in answers("HunyuanVideo", setting=GridSetting(text_len=7))[1:]:
        assert agrees(answer, "text_len = 7, but 24 tokens are no video")


@pytest.mark.slow
def test_numbers_are_refused_for_a_length_that_is_a_symbol():
    for answer in answers("HunyuanVideo", True, GridSetting(latent_shape=(3, 4, 8), text_len=TEXT, prefix=0)):
        assert agrees(answer, "latent_shape = (3, 4, 8) with text_len = 24 is 120 tokens, but the attention has s")


@pytest.mark.slow
def test_mochi_has_its_grid_where_the_graph_is_one_with_as_many_text_tokens_as_the_data_says():
    """By default Dynamo breaks its graph at them, and its attention is in none."""
    settings = {"capture_dynamic_output_shape_ops": True, "reorderable_logging_functions": {warnings.warn}}
    with torch._dynamo.config.patch(settings):
        ((graph, sites),) = graphs_of(*from_coverage("mochi"), None)
    pooled, *joint = (find_grid(graph, site, GridSetting()) for site in sites)
    assert agrees(pooled, CROSS)
    for site, answer in zip(sites[1:], joint, strict=True):
        assert (answer.frames, answer.height, answer.width, answer.before) == (2, 4, 4, 0)
        assert known(answer.length == site.tensor("query").size(2))
    said = [find_grid(graph, site, GridSetting(latent_shape=(2, 4, 4), text_len=12)) for site in sites[1:]]
    assert all(agrees(x, "but the attention has u") for x in said)


# Small functions: what is evidence, and what only looks like it.

T, H, W, C = 3, 4, 8, 16
VIDEO = T * H * W


def find(function, *inputs, setting=None, mode="fake"):
    graph = make_fx(function, tracing_mode=mode)(*inputs).graph
    (site,) = find_sites(graph, {})
    return find_grid(graph, site, setting or GridSetting())


def attend(q, k=None):
    """Attention with four heads over (B, S, C), of a sequence with itself or with another."""
    k = q if k is None else k
    q, k = (x.unflatten(2, (4, x.size(2) // 4)).transpose(1, 2) for x in (q, k))
    return attention(q, k, k)[0].transpose(1, 2).flatten(2)


def patches(latents, weight):
    return torch.nn.functional.conv3d(latents, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def latent_inputs(batch=1):
    return torch.randn(batch, 4, T, 2 * H, 2 * W), torch.randn(C, 4, 1, 2, 2)


def positions(*ranges, width=C):
    """A table of three ranges, a third of the width each."""
    grid = torch.meshgrid(*(torch.arange(n) for n in ranges), indexing="ij")
    return torch.cat([x[..., None].expand(*ranges, width // 4) for x in (grid[0], *grid)], -1)


def as_tuple(grid):
    assert isinstance(grid, TokenGrid), grid
    return grid.frames, grid.height, grid.width, grid.before, grid.after


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_patches_of_a_convolution(mode, batch):
    found = find(lambda x, w: attend(patches(x, w)), *latent_inputs(batch), mode=mode)
    assert agrees(found, (T, H, W, 0, 0)) and "aten.convolution" in found.source


def test_patches_that_are_cut_by_views():
    def function(latents):
        x = latents.unflatten(4, (W, 2)).unflatten(3, (H, 2)).permute(0, 2, 3, 5, 4, 6, 1)
        return attend(x.flatten(4).flatten(1, 3))

    assert as_tuple(find(function, latent_inputs()[0])) == (T, H, W, 0, 0)


def test_frames_in_the_batch_of_the_convolution():
    def function(latents, weight):
        x = torch.nn.functional.conv2d(latents.flatten(0, 1), weight, stride=2)
        return attend(x.unflatten(0, (2, T)).flatten(3).transpose(2, 3).flatten(1, 2))

    assert as_tuple(find(function, torch.randn(2, T, 4, 2 * H, 2 * W), torch.randn(C, 4, 2, 2))) == (T, H, W, 0, 0)


def test_positions_of_three_ranges():
    def function(x):
        return attend(x + positions(T, H, W).flatten(0, 2))

    assert as_tuple(find(function, torch.randn(1, VIDEO, C))) == (T, H, W, 0, 0)


def test_positions_of_one_frame():
    def function(x):
        return attend(x + positions(1, H, W).flatten(0, 2))

    assert as_tuple(find(function, torch.randn(1, H * W, C))) == (1, H, W, 0, 0)


def test_a_frame_at_a_time_is_a_picture():
    def function(latents, weight):
        return attend(torch.nn.functional.conv2d(latents, weight, stride=2).flatten(2).transpose(1, 2))

    assert as_tuple(find(function, torch.randn(T, 4, 2 * H, 2 * W), torch.randn(C, 4, 2, 2))) == (1, H, W, 0, 0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_text_as_long_as_the_video_is_not_taken_for_it(mode, first):
    """Also where the text has attended the video before."""

    def function(latents, weight, text):
        video = patches(latents, weight)
        both = torch.cat((text, video) if first else (video, text), 1)
        both = both + torch.softmax(both @ both.transpose(1, 2), -1) @ both
        cut = (text if first else video).size(1)
        a, b = both[:, :cut], both[:, cut:]
        return attend(torch.cat((a.sin(), b.cos()), 1))

    found = find(function, *latent_inputs(), torch.randn(1, VIDEO, C), mode=mode)
    assert agrees(found, (T, H, W, VIDEO, 0) if first else (T, H, W, 0, VIDEO))


def test_text_alone_has_no_grid_though_it_is_as_long_as_the_video():
    def function(latents, weight, text):
        return attend(text) + patches(latents, weight)

    found = find(function, *latent_inputs(), torch.randn(1, VIDEO, C))
    assert agrees(found, NO_GRID)


def test_text_as_long_as_the_video_is_no_grid_for_cross_attention():
    def function(latents, weight, text):
        return attend(patches(latents, weight), text)

    assert agrees(find(function, *latent_inputs(), torch.randn(1, VIDEO, C)), NO_GRID)


def test_channels_that_are_as_many_as_the_tokens_and_split_in_three_are_no_grid():
    def function(x):
        return attend(x.unflatten(2, (T, H, W)).sin().flatten(2) + x)

    assert agrees(find(function, torch.randn(1, VIDEO, VIDEO)), NO_GRID)


def test_queries_that_come_from_another_graph_have_no_grid():
    def function(query, text):
        both = torch.cat((query, text), 2)
        return attention(both, both, both)[0]

    query, text = torch.randn(1, 4, VIDEO, C), torch.randn(1, 4, 24, C)
    assert agrees(find(function, query, text), NO_GRID)
    said = find(function, query, text, setting=GridSetting(latent_shape=(T, H, W), text_len=24, prefix=0))
    assert as_tuple(said) == (T, H, W, 0, 24)


def test_a_convolution_elsewhere_of_as_many_positions_is_no_grid():
    def function(latents, weight, x):
        return attend(x) * patches(latents, weight).mean()

    assert agrees(find(function, *latent_inputs(), torch.randn(1, VIDEO, C)), NO_GRID)


def test_hidden_states_of_two_dimensions_are_no_picture():
    def function(x, weight):
        return attend((x.flatten(0, 2) @ weight)[None])

    assert agrees(find(function, torch.randn(1, T, H * W, C), torch.randn(C, C)), NO_GRID)


def test_frames_of_one_place_are_no_grid():
    def function(latents, weight):
        x = torch.nn.functional.conv3d(latents, weight, stride=(1, 2, 2))
        return attend(x.permute(0, 3, 4, 2, 1).flatten(0, 2))

    assert agrees(find(function, *latent_inputs()), NO_GRID)


def test_tokens_in_another_order_are_refused():
    def columns_first(latents, weight):
        x = torch.nn.functional.conv3d(latents, weight, stride=(1, 2, 2))
        return attend(x.transpose(3, 4).flatten(2).transpose(1, 2))

    def windows(latents, weight):
        x = torch.nn.functional.conv3d(latents, weight, stride=(1, 2, 2)).unflatten(4, (W // 2, 2))
        return attend(x.unflatten(3, (H // 2, 2)).transpose(4, 5).flatten(2).transpose(1, 2))

    for function in (columns_first, windows):
        found = find(function, *latent_inputs())
        assert agrees(found, "the tokens are in no order of frames, rows and columns of aten.convolution")


def test_two_pictures_in_one_sequence_are_refused_with_both():
    def function(one, other, weight):
        parts = [torch.nn.functional.conv2d(x, weight, stride=2).flatten(2).transpose(1, 2) for x in (one, other)]
        return attend(torch.cat(parts, 1))

    found = find(function, torch.randn(1, 4, 8, 16), torch.randn(1, 4, 4, 8), torch.randn(C, 4, 2, 2))
    assert agrees(found, "two grids") and "(1, 4, 8) after 0" in found.reason and "(1, 2, 4) after 32" in found.reason


def test_positions_that_contradict_the_patches_are_refused_with_both():
    def function(latents, weight):
        return attend(patches(latents, weight) + positions(H, T, W).flatten(0, 2))

    found = find(function, *latent_inputs())
    assert agrees(found, "two grids") and "(3, 4, 8)" in found.reason and "(4, 3, 8)" in found.reason


def test_positions_that_merge_rows_and_columns_do_not_contradict_the_patches():
    def function(latents, weight):
        return attend(patches(latents, weight) + positions(1, T, H * W).flatten(0, 2))

    assert as_tuple(find(function, *latent_inputs())) == (T, H, W, 0, 0)


def test_a_patch_size_that_fits_two_inputs_differently_is_refused_with_both():
    def function(one, other, x):
        return attend(x) + one.sum() + other.sum()

    latents = torch.randn(1, 4, 3, 8, 16), torch.randn(1, 4, 3, 16, 8)
    found = find(function, *latents, torch.randn(1, VIDEO, C), setting=GridSetting(patch_size=(1, 2, 2)))
    assert agrees(found, "patch_size = (1, 2, 2) fits two inputs") and "(3, 4, 8)" in found.reason


# Text that looks like a video.


def table(*sizes):
    """Learned, or text itself: any values."""
    return torch.randn(1, *sizes, C)


def ranges(t, h, w):
    return positions(t, h, w).flatten(0, 2)


TEXT_TABLES = {
    "text of three levels": lambda x, w: attend(x.flatten(1, 3)),
    "a learned table of three levels": lambda x, w: attend(x[:, :1, :1, :1].flatten(1, 3) + x.flatten(1, 3)),
    "a view as three levels": lambda x, w: attend((x.flatten(1, 3).unflatten(1, (T, H, W)).sin()).flatten(1, 3)),
    "three ranges, added before the projection": lambda x, w: attend((x.flatten(1, 3) + ranges(T, H, W)) @ w),
    "a picture's ranges, added before the projection": lambda x, w: attend((x.flatten(1, 3) + ranges(1, T * H, W)) @ w),
}


@pytest.mark.parametrize("name", TEXT_TABLES)
def test_text_of_three_levels_is_no_grid(name):
    assert agrees(find(TEXT_TABLES[name], table(T, H, W), torch.randn(C, C)), NO_GRID)


def test_ids_of_three_levels_are_no_grid():
    def function(ids, weight):
        return attend(torch.nn.functional.embedding(ids, weight).flatten(1, -2))

    for shape in ((1, T, H, W), (1, 1, H, W)):
        assert agrees(find(function, torch.randint(9, shape), torch.randn(9, C)), NO_GRID)


def test_positions_of_text_are_no_grid_beside_patches_of_another_sequence():
    def function(latents, weight, text):
        return attend(text * ranges(T, H, W)) + patches(latents, weight)

    found = find(function, *latent_inputs(), torch.randn(1, VIDEO, C))
    assert agrees(found, "were not made of the patches that the graph has (aten.convolution")


CHOICES = {
    "where": lambda mask, video, text: torch.where(mask, video, text),
    "where, after a projection": lambda mask, video, text: torch.where(mask, video, text @ text.new_ones(C, C)),
    "lerp": lambda mask, video, text: torch.lerp(text, video, mask.to(video.dtype)),
    "arithmetic": lambda mask, video, text: video * mask + text * ~mask,
    "arithmetic with numbers": lambda mask, video, text: video * mask.float() + text * (1 - mask.float()),
    "two texts": lambda mask, video, text: torch.where(mask, text.sin(), torch.where(~mask, text, video)),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("made_of", ["patches", "positions"])
def test_text_among_the_rows_of_a_video_is_refused(name, made_of):
    """No row of it could be kept whole."""

    def of_patches(latents, weight, text, mask):
        return attend(CHOICES[name](mask, patches(latents, weight), text))

    def of_positions(video, text, mask):
        return attend(CHOICES[name](mask, video, text) * ranges(T, H, W))

    text, mask = torch.randn(1, VIDEO, C), torch.rand(1, VIDEO, 1) < 0.5
    if made_of == "patches":
        found = find(of_patches, *latent_inputs(), text, mask)
    else:
        found = find(of_positions, torch.randn(1, VIDEO, C), text, mask)
    assert agrees(found, "its rows are chosen one by one from different tokens by aten.")


def test_rows_that_are_chosen_from_the_same_tokens_or_from_one_value_stay_a_grid():
    def function(latents, weight, mask, pad):
        x = patches(latents, weight)
        x = torch.where(mask, x, pad) + x * mask
        return attend(torch.where(mask, x.sin(), x))

    found = find(function, *latent_inputs(), torch.rand(1, VIDEO, 1) < 0.5, torch.randn(C))
    assert as_tuple(found) == (T, H, W, 0, 0)


@pytest.mark.parametrize("first", [True, False])
def test_rows_that_are_chosen_among_the_text_alone_leave_the_video_a_grid(first):
    def function(latents, weight, one, other, mask):
        text, video = torch.where(mask, one, other), patches(latents, weight)
        return attend(torch.cat((text, video) if first else (video, text), 1))

    found = find(function, *latent_inputs(), *torch.randn(2, 1, 24, C), torch.rand(1, 24, 1) < 0.5)
    assert as_tuple(found) == ((T, H, W, 24, 0) if first else (T, H, W, 0, 24))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"text_len": 24, "prefix": 0}, "prefix = 0, but 24 tokens stand before the video"),
        ({"prefix": 5, "text_len": 24}, "prefix = 5, but 24 tokens stand before the video"),
        ({"text_len": 0}, "text_len = 0, but 24 tokens are no video"),
    ],
    ids=str,
)
def test_what_is_said_of_the_text_against_the_graph_is_refused_with_both(said, reason):
    def function(latents, weight, text):
        return attend(torch.cat((text, patches(latents, weight)), 1))

    given = (*latent_inputs(), torch.randn(1, 24, C))
    assert agrees(find(function, *given, setting=GridSetting(**said)), reason)
    assert as_tuple(find(function, *given, setting=GridSetting(text_len=24, prefix=24))) == (T, H, W, 24, 0)
