"""The page in headless Chromium: it renders, asks for nothing, and does what its keys and fields say."""

from __future__ import annotations

import importlib.util
import os

import pytest
from html_reports import RING, layers, report, site, trace

from docs.browser import browser, chromium
from sgl_npu.compiler.html import page

HOSTILE = '<img src="x" onerror="window.hit = 1"><script>window.hit = 1</script>'


@pytest.fixture(scope="module")
def tab():
    missing = "Chromium: apt-get install chromium" if chromium() is None else ""
    missing = missing or (
        "playwright: pip install playwright" if importlib.util.find_spec("playwright") is None else ""
    )
    if missing and os.environ.get("CI"):
        pytest.fail(f"pages are tested in CI, and there is no {missing}")
    if missing:
        pytest.skip(f"there is no {missing}")
    with browser() as found:
        tab = found.new_page()
        tab.set_default_timeout(30_000)  # on a busy machine
        yield tab


@pytest.fixture
def show(tab, tmp_path):
    """Opens a report's page. Whatever it asks for, logs or raises fails the test."""
    noise, pages = [], []
    watchers = {
        "console": lambda message: noise.append(f"{message.type}: {message.text}"),
        "pageerror": lambda error: noise.append(str(error)),
        "request": lambda request: noise.append(request.url) if request.url not in pages else None,
    }

    def opened(given, theme="light", size=(1366, 768), fragment=""):
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(page(given, "A model"), encoding="utf-8")
        pages.append(path.as_uri())
        tab.set_viewport_size({"width": size[0], "height": size[1]})
        tab.emulate_media(color_scheme=theme)
        tab.goto(path.as_uri() + fragment)
        return tab

    for name, watcher in watchers.items():
        tab.on(name, watcher)
    yield opened
    tab.evaluate("localStorage.clear()")
    for name, watcher in watchers.items():
        tab.remove_listener(name, watcher)
    assert noise == []


def mixed():
    """Three fused attentions of a ring, one that is not, a near miss."""
    ring = {"scheme": "ring", "sent": "50000000", "collectives": "ring - 1 shifts"}
    sites = [
        *(site(number, f"encoder.layers.{number}.attn", **ring) for number in range(3)),
        site(3, "decoder.cross", op="aten (decomposed)", kernel="reference", fused=False, mask="tensor"),
        site(4, "decoder.router", op="", kernel="", fused=False, mask="", query=(), key=(), value=()),
    ]
    sites[4].refusals = [("match", "scores are no product")]
    graphs = {
        "before": "a: b8[64, 64] = aten._softmax(x)",
        "after": "b: bf16[1] = npu.npu_fused_infer_attention_score(x)",
    }
    traces = [trace(schedule=RING, **graphs) for _ in range(3)]
    return report(sites, [*traces, trace(mask_node="mask"), trace()])


def shown(tab) -> list[str]:
    return [row.text_content() for row in tab.locator("#sites tbody tr:not([hidden]) td:first-child").all()]


def selected(tab) -> str:
    return tab.locator("#sites tr[aria-selected=true] td:first-child").text_content()


def focused(tab) -> str:
    return tab.evaluate("document.activeElement.id")


def test_the_first_attention_is_open_with_all_its_parts(show):
    tab = show(mixed())
    assert selected(tab) == "0" and tab.locator("#detail h2").text_content() == "encoder.layers.0.attn"
    assert tab.locator("#detail svg.mask").count() == 1 and tab.locator("#detail svg.timeline").count() == 1
    assert tab.locator("#detail .route li").count() >= 4 and tab.locator("#around pre").count() == 2
    assert tab.locator("main [data-part]:empty").count() == 0
    assert tab.locator("#count").text_content() == "5 attentions"


def test_every_attention_opens(show):
    tab = show(mixed())
    for row in tab.locator("#sites tbody tr").all():
        row.click()
        assert row.get_attribute("aria-selected") == "true" and tab.locator("#detail .route li").count() > 0
    assert "scores are no product" in tab.locator("#detail").text_content()


def test_an_explained_model_is_shown(show, explained):
    tab = show(explained)
    assert tab.locator("#detail svg.mask").count() == 2  # of the two samples, one is padded
    tab.locator("#site-2").click()
    assert tab.locator("#detail svg.mask").count() == 1
    assert "band(-5, 0)" in tab.locator("#detail").text_content()


def test_text_filters_rows_word_by_word(show):
    tab = show(mixed())
    tab.locator("#filter").fill("ENCODER 1")
    assert shown(tab) == ["1"] and tab.locator("#count").text_content() == "1 of 5 attentions"
    assert selected(tab) == "1", "what is open is among what is shown"
    tab.locator("#filter").fill("decomposed")
    assert shown(tab) == ["3"]
    tab.locator("#filter").fill("no such thing")
    assert shown(tab) == [] and tab.locator("#none").is_visible()
    tab.keyboard.press("Escape")
    assert len(shown(tab)) == 5 and tab.locator("#none").is_hidden()


def test_modules_and_ops_filter_rows_together(show):
    tab = show(mixed())
    tab.locator("#module").select_option("encoder.layers.*.attn")
    assert shown(tab) == ["0", "1", "2"]
    tab.locator("#op").select_option("aten (decomposed)")
    assert shown(tab) == []
    tab.locator("#module").select_option("")
    assert shown(tab) == ["3"]


def test_everything_is_reached_by_keys(show):
    tab = show(mixed())
    tab.keyboard.press("/")
    assert focused(tab) == "filter" and tab.locator("#filter").input_value() == ""
    tab.keyboard.type("layers")
    tab.keyboard.press("ArrowDown")
    assert focused(tab) == "site-0"
    for key, expected in (
        ("ArrowDown", "1"),
        ("End", "2"),
        ("ArrowDown", "2"),
        ("ArrowUp", "1"),
        ("Home", "0"),
        ("j", "1"),
    ):
        tab.keyboard.press(key)
        assert selected(tab) == expected and focused(tab) == f"site-{expected}"
    tab.keyboard.press("Enter")
    assert focused(tab) == "detail" and "layers.1" in tab.locator("#detail h2").text_content()
    tab.keyboard.press("Escape")
    assert focused(tab) == "site-1"


def test_one_row_is_in_the_order_of_tabs(show):
    tab = show(mixed())
    for _ in range(2):
        assert tab.locator('#sites tr[tabindex="0"]').count() == 1
        assert tab.locator('#sites tr[tabindex="0"]').get_attribute("aria-selected") == "true"
        tab.locator("#site-3").click()


def test_keys_of_the_browser_are_left_alone(show):
    tab = show(mixed())
    tab.locator("#filter").focus()
    tab.keyboard.type("t/j")
    assert tab.locator("#filter").input_value() == "t/j" and tab.locator("html").get_attribute("data-theme") is None


PAPER = "getComputedStyle(document.body).backgroundColor"


def test_colours_follow_the_system_until_they_are_chosen(show):
    papers = {theme: show(mixed(), theme=theme).evaluate(PAPER) for theme in ("light", "dark")}
    assert papers["light"] != papers["dark"]
    tab = show(mixed(), theme="dark")
    for name, paper in (("light", "light"), ("dark", "dark"), (None, "dark")):
        tab.keyboard.press("t") if name == "dark" else tab.locator("#theme").click()
        assert tab.locator("html").get_attribute("data-theme") == name
        assert tab.evaluate(PAPER) == papers[paper]


CONTRAST = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (x) => (x <= 10 ? x / 3294 : ((x / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const paper = (node) => {
    for (; node; node = node.parentElement) {
      const found = numbers(getComputedStyle(node).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const worst = [];
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    const text = texts.currentNode.data.trim();
    if (!text || !node.offsetParent || node.closest("svg, script, style, template, select, .sr")) continue;
    const [one, other] = [light(numbers(getComputedStyle(node).color)), light(paper(node))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) worst.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`);
  }
  return worst;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_paper(show, theme):
    tab = show(mixed(), theme=theme)
    assert tab.evaluate(CONTRAST) == []
    tab.locator("#site-4").click()
    assert tab.evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [1366, 1024, 800])
def test_a_page_is_no_wider_than_its_screen(show, width):
    tab = show(mixed(), size=(width, 768))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1400, 1000, 800])
def test_no_line_of_a_graph_and_no_total_is_cut(show, width):
    names = ", ".join(f"argument{number}=tensor{number}" for number in range(40))
    given = mixed()
    given.trace.sites[0].after = f"b: bf16[1] = npu.npu_fused_infer_attention_score({names})"
    for costs in (given.trace.before, given.trace.after):
        costs["layers.0"].bytes = 34_400_000
    tab = show(given, size=(width, 768))
    assert tab.locator("#around pre .attention").count() == 2
    cut = "found => found.filter(x => x.scrollWidth > x.clientWidth).map(x => x.textContent)"
    for what in ("#around pre", ".tile .value", "#sites td:nth-child(3)"):
        assert tab.locator(what).evaluate_all(cut) == [], what


def test_graphs_take_the_width_of_the_page(show):
    tab = show(mixed(), size=(1400, 768))
    boxes = [tab.locator(what).bounding_box() for what in ("#detail", "#around", "main")]
    assert boxes[1]["width"] == boxes[2]["width"] and boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    tab.locator("#site-4").click()
    assert tab.locator("#around").is_hidden()
    tab.locator("#site-0").click()
    tab.locator("#around pre").first.focus()
    tab.keyboard.press("Escape")
    assert focused(tab) == "site-0"


def test_a_long_mask_is_whole_in_the_list(show):
    mask = "causal & documents + bias"
    tab = show(report([site(0, "a", mask=mask)], [trace()]), size=(1000, 768))
    cell = tab.locator("#site-0 td:nth-child(3)")
    assert cell.text_content() == mask and cell.evaluate("x => x.scrollWidth <= x.clientWidth")


def test_mask_route_and_table_are_on_the_first_screen_of_a_laptop(show, explained):
    tab = show(explained)
    for what in ("#site-2", "#detail svg.mask", "#detail .route li:first-child", "#detail dl"):
        box = tab.locator(what).first.bounding_box()
        assert box["y"] + box["height"] <= 768 and box["x"] + box["width"] <= 1366, what


def test_what_a_model_calls_its_parts_runs_nothing(show):
    found = site(0, HOSTILE, mask=HOSTILE, op=HOSTILE, kernel=HOSTILE, source=HOSTILE, spelling=HOSTILE)
    found.refusals = [(HOSTILE, HOSTILE)]
    tab = show(report([found, site(1, "b")], [trace(before=HOSTILE, after=HOSTILE), trace()]))
    tab.locator("#site-1").click()
    tab.locator("#site-0").click()
    assert tab.evaluate("window.hit") is None
    assert tab.locator("#detail h2").text_content() == HOSTILE
    assert tab.locator("img").count() == 0


def test_an_address_may_name_an_attention(show):
    assert selected(show(mixed(), fragment="#site=3")) == "3"


def test_a_hundred_layers_open_and_filter(show):
    tab = show(layers(100, alike=False))
    tab.locator("#filter").fill("layers.99")
    assert shown(tab) == ["99"] and tab.locator("#detail svg.mask").count() == 1


def test_pages_without_attentions_are_whole(show):
    tab = show(report([]))
    assert tab.locator(".notice").text_content() == "No attention was found."
    tab.locator("#theme").click()
    assert tab.locator("html").get_attribute("data-theme") == "light"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures_of_the_page_can_be_taken(show, theme, tmp_path):
    path = tmp_path / f"{theme}.png"
    show(mixed(), theme=theme).screenshot(path=path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
