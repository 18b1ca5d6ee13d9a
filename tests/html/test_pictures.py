"""Pictures of masks and of schedules: they show what is so, to the pair and to the step."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from html_reports import RING, site, trace

from sgl_npu.compiler.html import timeline
from sgl_npu.compiler.html.graph_view import graph_view
from sgl_npu.compiler.html.mask_form import MaskForm, mask_form
from sgl_npu.compiler.html.mask_picture import mask_pictures
from sgl_npu.compiler.html.numbers import bytes_text, change_text, count_text, seconds_text, ticks
from sgl_npu.compiler.trace import Raster
from sgl_npu.lowering.sequence.schedule import Step

BANDS = [(None, None), (None, 0), (-6, 0), (None, 9), (-3, 3), (5, None), (None, -4), (2, 1), (-100, 100)]


def allowed(form: MaskForm) -> torch.Tensor:
    distance = torch.arange(form.keys)[None] - torch.arange(form.rows)[:, None]
    lower, upper = (
        (float("-inf") if form.lower is None else form.lower),
        (float("inf") if form.upper is None else form.upper),
    )
    return (distance >= lower) & (distance <= upper)


def outline(picture: str) -> list[tuple[float, float]]:
    path = re.search(r'<path class="\w+" d="M([^"]*)Z"', picture)
    assert path is not None
    return [tuple(map(float, point.split())) for point in path[1].split("L")]


def area(points: list[tuple[float, float]]) -> float:
    pairs = zip(points, [*points[1:], points[0]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


@pytest.mark.parametrize(("lower", "upper"), BANDS)
@pytest.mark.parametrize(("rows", "keys"), [(20, 20), (7, 30), (30, 7), (1, 16), (128, 128)])
def test_a_band_is_drawn_to_the_pair(rows, keys, lower, upper):
    form = MaskForm(rows, keys, lower, upper, False)
    pairs = int(allowed(form).sum())
    assert form.pairs == pairs
    ((picture, _),) = mask_pictures(form, None)
    assert area(outline(picture)) == pairs


@pytest.mark.parametrize(("lower", "upper"), BANDS)
def test_a_long_band_is_drawn_by_its_corners(lower, upper):
    form = MaskForm(1000, 1400, lower, upper, False)
    ((picture, _),) = mask_pictures(form, None)
    points = outline(picture)
    assert len(points) < 14
    assert area(points) == pytest.approx(int(allowed(form).sum()), abs=2000)


def test_pairs_of_a_very_long_band_are_counted():
    assert MaskForm(300_000, 300_000, None, 0, False).pairs == 300_000 * 300_001 // 2
    assert MaskForm(4, 4, 3, 1, False).pairs == 0


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("full", (None, None, False)),
        ("causal", (None, 0, False)),
        ("causal (bottom-right)", (None, -16, False)),
        ("band(-6, 0)", (-6, 0, False)),
        ("band(-inf, 3)", (None, 3, False)),
        ("band(2, inf)", (2, None, False)),
        ("causal & documents", (None, 0, True)),
        ("tensor", (None, None, True)),
        ("causal + bias", (None, 0, False)),
        ("band(s0 - 3, 0)", (None, None, True)),
    ],
)
def test_without_a_trace_the_words_of_the_report_are_the_form(mask, expected):
    form = mask_form(site(0, mask=mask, query=("1", "8", "64", "16"), key=("1", "8", "48", "16")), None)
    assert form is not None and (form.lower, form.upper, form.data) == expected


def test_a_trace_knows_the_sizes_that_are_symbols():
    symbolic = site(0, query=("1", "8", "s0", "16"))
    assert mask_form(symbolic, None) is None
    assert mask_form(symbolic, trace(lower=-3)) == MaskForm(64, 64, -3, 0, False)


def test_what_data_decides_is_hatched_until_it_was_seen():
    form = MaskForm(4, 4, None, 0, True)
    assert 'class="maybe"' in mask_pictures(form, trace())[0][0]
    seen = [Raster("sample 0", "4444"), Raster("sample 1", "0044")]
    pictures = mask_pictures(form, trace(seen=seen))
    assert [caption for _, caption in pictures] == ["sample 0", "sample 1"]
    assert 'd="m2 0h2v1h-2z"' in pictures[1][0] and "clip-path" in pictures[1][0]


def test_samples_that_are_alike_are_one_picture():
    seen = [Raster("sample 0", "44"), Raster("sample 1", "44")]
    assert [caption for _, caption in mask_pictures(MaskForm(2, 2, None, None, True), trace(seen=seen))] == [""]


def test_cells_of_a_part_are_shades_and_equal_lines_are_one_rectangle():
    raster = Raster("", "4400\n4400\n0011")
    ((picture, _),) = mask_pictures(MaskForm(3, 4, None, None, True), trace(raster=raster))
    assert '<path class="cells" opacity="1" d="m0 0h2v2h-2z"/>' in picture
    assert '<path class="cells" opacity="0.25" d="m2 2h2v1h-2z"/>' in picture


def test_steps_start_when_what_they_wait_for_is_done():
    shift, own, hop = timeline.spans(RING)
    assert shift.start == own.start == 0.0
    assert shift.end == pytest.approx(1e-3) and own.end == pytest.approx(2e-3)
    assert hop.start == own.end


def test_each_rank_has_two_lanes_and_what_it_leaves_out_is_marked():
    text = timeline.timeline(RING)
    assert text.count('class="lane"') == 4
    assert text.count('class="send"') == 2 and text.count('class="compute"') == 3 and text.count('class="unused"') == 1


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (1.3e-6, ["0", "0.33 µs", "0.65 µs", "0.98 µs", "1.30 µs"]),
        (8e-6, ["0", "2.0 µs", "4.0 µs", "6.0 µs", "8.0 µs"]),
        (4e-7, ["0", "100 ns", "200 ns", "300 ns", "400 ns"]),
        (3e-9, ["0", "0.75 ns", "1.50 ns", "2.25 ns", "3.00 ns"]),
        (2.4e-3, ["0", "0.60 ms", "1.20 ms", "1.80 ms", "2.40 ms"]),
        (1.0, ["0", "0.25 s", "0.50 s", "0.75 s", "1.00 s"]),
    ],
)  # fmt: skip
def test_ticks_have_the_decimals_that_tell_them_apart(end, expected):
    assert ticks(end, 4) == expected


def test_the_axis_of_a_schedule_has_its_ticks():
    short = replace(RING, steps=(Step("compute", "its own keys", 260_000_000, ("k0", "k1")),))
    found = re.findall(r'<text class="tick"[^>]*>([^<]*)<', timeline.timeline(short))
    assert found == ["0", "0.33 µs", "0.65 µs", "0.98 µs", "1.30 µs"]


def test_of_many_ranks_the_first_are_drawn():

    many = replace(RING, ulysses=16)
    assert timeline.timeline(many).count('class="rank"') == 8
    assert any("first 8 of 32 ranks" in line for line in timeline.facts(many))


def test_lines_of_one_side_the_attention_and_squares_are_marked():
    scores = "scores: bf16[1, 8, 8] = aten.bmm(input, input)\nsoftmax: bf16[1, 8, 8] = aten._softmax(scores)"
    before = f"input: bf16[2, 8]\n{scores}"
    after = "input: bf16[2, 8]\nflash: bf16[1, 4] = npu.npu_fused_infer_attention_score(input)"
    lines = graph_view(before, after, (8, 8)).split("</span>")
    assert lines[0].startswith("<span>input")
    assert lines[1].startswith('<span class="own">') and '<i class="sq">bf16[1, 8, 8]</i>' in lines[1]
    assert lines[2].startswith('<span class="own attention">')
    assert 'class="own attention">flash' in graph_view(after, before, (8, 8))


def test_names_of_nodes_make_no_difference():
    one, other = "view3: bf16[2] = aten.view(mul7, [2])", "view: bf16[2] = aten.view(mul, [2])"
    assert "own" not in graph_view(one, other, None)


def test_numbers_are_for_readers():
    assert [bytes_text(x) for x in (0, 1023, 1024, 1536, 1 << 30)] == ["0 B", "1023 B", "1 KiB", "1.5 KiB", "1 GiB"]
    assert [count_text(x) for x in (12, 1360, 2.5e9)] == ["12 ", "1.36 k", "2.5 G"]
    assert [seconds_text(x) for x in (2.345, 0.0123, 2e-5, 2.4e-6, 3e-8)] == [
        "2.35 s", "12.3 ms", "20 µs", "2.4 µs", "30 ns",
    ]  # fmt: skip
    assert [change_text(*x) for x in ((4, 1), (4, 5), (4, 4), (0, 1))] == ["-75%", "+25%", "", ""]


def test_what_is_proved_goes_before_what_was_seen():
    both = trace(raster=Raster("", "40\n04"), seen=[Raster("", "44\n44")])
    ((picture, _),) = mask_pictures(MaskForm(2, 2, None, None, True), both)
    assert 'd="m0 0h1v1h-1zm1 1h1v1h-1z"' in picture


def test_what_communication_costs_is_said_in_words():
    assert timeline.facts(RING)[1:] == [
        "for one call a rank sends 47.7 MiB in 1 message and computes 800 GFLOP",
        "all communication is hidden behind what is computed",
    ]
    late = replace(RING, steps=(RING.steps[0], replace(RING.steps[1], after=(0,))))
    assert timeline.facts(late)[2] == "33% of the time drawn is communication that nothing hides"
    assert "a rank sends nothing" in timeline.facts(replace(RING, steps=RING.steps[1:2]))[1]
