"""The page as text: what it holds, that nothing in it is taken for markup, that it asks for nothing, its size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from html_reports import RING, layers, report, site, trace

from sgl_npu.compiler.html import SIZE_LIMIT, page
from sgl_npu.compiler.report import Report
from sgl_npu.passes.parallel import ParallelReport


class Parsed(HTMLParser):
    """Tags with their attributes, and the text; `unclosed` is what has no end."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def text_of(given: Report) -> str:
    return Parsed(page(given)).text


def test_every_tag_is_closed_and_every_reference_has_its_part(explained):
    for given in (explained, layers(3), report([]), Report()):
        parsed = Parsed(page(given))
        assert parsed.open == []
        named = {x["id"] for _, x in parsed.tags if "id" in x}
        wanted = {f"part-{x[key]}" for _, x in parsed.tags for key in ("data-part", "data-detail") if key in x}
        assert wanted <= named


def test_a_page_asks_for_nothing(explained):
    text = page(explained, "a title")
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"http://www\.w3\.org/2000/svg", "", text))
    for tag, attributes in Parsed(text).tags:
        assert tag not in ("img", "iframe", "object", "base")
        assert "src" not in attributes and (attributes.get("href") or "data:,") == "data:,"


@pytest.mark.parametrize(
    "change",
    [
        {"module": "<script>alert(1)</script>"},
        {"source": '"><script>alert(1)</script>.py:3'},
        {"mask": "<script>alert(1)</script>"},
        {"op": "'><script>alert(1)</script>"},
        {"kernel": "<script>alert(1)</script>"},
        {"spelling": "<script>alert(1)</script>"},
        {"dtype": "<script>alert(1)</script>"},
        {"guards": ["<script>alert(1)</script>"]},
        {"refusals": [("k", "<script>alert(1)</script>")]},
        {"query": ("<script>alert(1)</script>", "8", "64", "16")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_model_calls_its_parts_is_text(change):
    text = page(report([replace(site(0, "a"), **change)], [trace()]))
    assert "<script>alert" not in text and "alert(1)" in text
    assert [tag for tag, _ in Parsed(text).tags].count("script") == 1


@pytest.mark.parametrize("name", ["before", "after", "mask_given", "mask_kept", "condition"])
def test_what_a_graph_holds_is_text(name):
    found = trace(**{name: "view: </template></pre><script>alert(1)</script>", "mask_node": "m"})
    text = page(report([site(0, "a")], [found]))
    assert "<script>alert" not in text and text.count("</script>") == 1


def test_the_title_and_what_is_said_of_ranks_are_text():
    refused = ParallelReport("2 x 1", gathers=[("<script>", "('1',)", "<script>")], refused="<script>alert(1)</script>")
    text = page(report([site(0)], parallel=[refused]), "<script>alert(1)</script>")
    assert text.count("<script>") == text.count("</script>") == 1


def test_the_same_report_is_the_same_page(explained):
    assert page(explained) == page(explained)


def test_the_page_is_the_same_in_another_process():
    code = "from html_reports import layers; from sgl_npu.compiler.html import page; print(page(layers(3, False)))"
    setting = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], env=setting, capture_output=True, text=True, encoding="utf-8")
    assert found.stdout == page(layers(3, False)) + "\n", found.stderr


def test_totals_say_how_many_are_fused_what_became_of_buffers_and_where_the_time_went():
    given = report([site(0, "layers.0"), site(1, "layers.1", fused=False, kernel="reference")], [trace(), trace()])
    text = text_of(given)
    for part in ("1 of 2", "1 x ascend_fa, 1 x reference", "2 → 0", "2 KiB → 0 B", "2.93 KiB → 1000 B", "-67%",
                 "in passes 300.0 ms of 1.00 s", "match 200.0 ms", "inference 3"):  # fmt: skip
        assert part in text


def test_a_site_tells_its_shapes_bytes_and_the_way_to_its_kernel():
    found = site(0, "attn", empty_rows="possible", averages_empty_rows=True, rotary="split, rotary embedding (halves)")
    found.refusals = [("ascend_fa", "softcap = 50.0: the kernel has no softcap")]
    steps = {"layout": "computed as (B, S, N, D), no transpose is left"}
    text = text_of(report([found], [trace(mask_given="b8[1, 1, 64, 64]", mask_bytes=(4096, 0), steps=steps)]))
    for part in (
        "(1, 8, 64, 16)", "query, key and value, read 24 KiB", "result, written 16 KiB", "scores, never written 64 KiB",
        "mask as the model has it 4 KiB (b8[1, 1, 64, 64])", "mask left as a tensor none",
        "b8[1, 1, 64, 64] was proved to be causal; no tensor is left", "such a query gets the average of all values",
        "8 of the query share 2 of key and value", "no transpose is left", "split, rotary embedding (halves)",
        "softcap = 50.0: the kernel has no softcap (refused)", OP_TEXT,
    ):  # fmt: skip
        assert part in text, part


OP_TEXT = "npu.npu_fused_infer_attention_score"


def test_a_mask_that_only_the_kernel_wants_is_a_step_and_has_its_bytes():
    masks = {"mask_given": "b8[2, 1, 64, 64]", "mask_kept": "b8[2, 1, 1, 64]", "mask_bytes": (8192, 128)}
    alone = trace(**masks, kernel_mask="b8[2, 1, 64, 64]", kernel_mask_bytes=8192, kernel_mask_sites=1)
    text = text_of(report([site(0, "a", mask="causal & tensor")], [alone]))
    assert "mask for the kernel b8[2, 1, 64, 64]: the kernel wants it whole; made for this attention alone" in text
    assert "mask for the kernel 8 KiB (b8[2, 1, 64, 64])" in text
    shared = text_of(report([site(0, "a")], [replace(alone, kernel_mask_sites=3)]))
    assert "made once for 3 attentions, at every call" in shared and "mask for the kernel, shared by 3 8 KiB" in shared
    assert "mask for the kernel" not in text_of(report([site(0, "a")], [trace(**masks)]))


def test_a_bias_is_said_not_to_be_drawn():
    said = "a float bias is added to the scores; it is not drawn"
    assert said in text_of(report([site(0, "a", mask="causal + bias")], [trace()]))
    assert said not in text_of(report([site(0, "a")], [trace()]))


def test_why_nothing_is_sent_is_said():
    silent = replace(RING, scheme="local", steps=RING.steps[1:2])
    local = site(0, "a", scheme="local", sent="0", collectives="none: every rank has these keys")
    assert "local: nothing is sent; every rank has these keys" in text_of(report([local], [trace(schedule=silent)]))
    assert "local: none: every rank has these keys" in text_of(report([local]))


def test_what_only_looks_like_attention_says_where_the_search_ended():
    found = site(0, "attn", op="", kernel="", fused=False, mask="", query=(), key=(), value=(), dtype="")
    found.refusals, found.deepest = [("match", "the scores are divided by the keys' norm")], "aten.div at model.py:9"
    text = text_of(report([found], []))
    for part in (
        "the scores are divided by the keys' norm",
        "as far as aten.div at model.py:9",
        "not captured",
        "0 of 1",
    ):
        assert part in text


def test_the_schedule_of_ranks_says_that_it_is_a_model():
    text = text_of(report([site(0, "a", scheme="ring", sent="50000000", collectives="ring - 1 shifts")],
                          [trace(schedule=RING)]))  # fmt: skip
    for part in ("rank 0", "rank 1", "shift 1", "k0", "not a measurement", "assumed and not measured",
                 "hop 1: 400 GFLOP, 2.0 ms; past the end of the sequence", "1 shift of keys and values"):  # fmt: skip
        assert part in text, part


def test_a_report_of_a_compilation_has_pictures_where_sizes_are_numbers_and_says_what_it_lacks():
    text = page(report([site(0, "a"), site(1, "b", query=("1", "8", "s0", "16"))]))
    assert text.count('class="mask"') == 1
    assert "explain(model" in text and "sizes of this attention are not known" in text


def test_pages_of_nothing_say_so():
    assert "No attention was found" in text_of(report([]))
    assert "No graph reached the backend" in text_of(Report())


def test_a_hundred_layers_that_are_alike_share_their_pictures_and_graphs():
    one, hundred = (len(page(layers(count))) for count in (1, 100))
    assert hundred - one < 99 * 600


def test_a_hundred_layers_of_which_no_two_are_alike_stay_within_the_limit():
    text = page(layers(100, alike=False))
    assert len(text.encode()) < SIZE_LIMIT
    assert text.count('<tr role="row" tabindex') == 100


def test_pictures_and_graphs_beyond_the_limit_are_left_out_and_counted():
    text = page(layers(300, alike=False))
    assert len(text.encode()) < 1.5 * SIZE_LIMIT
    assert re.search(r"limited in size: \d+ pictures and graphs are left out", text)


def test_a_file_is_written(tmp_path, explained):
    explained.to_html(tmp_path / "report.html", "three layers")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text == page(explained, "three layers") and "<h1>three layers</h1>" in text


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path, explained):
    with pytest.raises(FileNotFoundError):
        explained.to_html(tmp_path / "missing" / "report.html")
