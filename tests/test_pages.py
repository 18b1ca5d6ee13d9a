"""Pages of docs/ that are read from top to bottom: their code runs, and prints what stands below it."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sgl_npu
from sgl_npu.lowering.platforms import PLATFORMS, Platform

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("name", ["tour.md", "not_fused.md", "integrations.md", "flex_attention.md"])
def test_the_code_of_a_page_prints_what_stands_below_it(name, capsys, monkeypatch):
    torch._dynamo.reset()
    # Dynamo imports the module of what it compiles, and remembers it by its name.
    page = types.ModuleType(f"page_{name.removesuffix('.md')}")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    blocks = BLOCK.findall((DOCS / name).read_text())
    for code, printed in blocks:
        exec(compile(code, "<page>", "exec"), vars(page))
        assert capsys.readouterr().out == printed
    assert any(printed for _, printed in blocks)


def test_the_kernel_of_the_page_on_extending_is_a_kernel(monkeypatch):
    (code, _), *others = BLOCK.findall((DOCS / "extending.md").read_text())
    assert not others
    names = {}
    exec(compile(code, "<page>", "exec"), names)
    monkeypatch.setitem(PLATFORMS, "cpu", Platform("cpu", (names["MINE"], *PLATFORMS["cpu"].forward)))
    q, k, v = torch.randn(2, 4, 10, 32), *torch.randn(2, 2, 2, 12, 32).unbind()
    for options, taken in (({}, True), ({"is_causal": True}, False)):

        def attend(q, k, v, options=options):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

        torch._dynamo.reset()
        found = torch.compile(attend, backend="sgl_npu", options={"inner": "eager", "strict": True})(q, k, v)
        torch.testing.assert_close(found, attend(q, k, v))
        (site,) = sgl_npu.reports()[-1].sites
        assert (site.kernel == "mine") == taken
        assert taken or ("mine", "the kernel has no mask") in site.refusals


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
