"""Pages of docs/ that are read from top to bottom: their code runs, and prints what stands below it."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("name", ["tour.md", "not_fused.md", "integrations.md"])
def test_the_code_of_a_page_prints_what_stands_below_it(name, capsys, monkeypatch):
    torch._dynamo.reset()
    page = types.ModuleType("page")  # Dynamo imports the module of what it compiles
    monkeypatch.setitem(sys.modules, "page", page)
    blocks = BLOCK.findall((DOCS / name).read_text())
    for code, printed in blocks:
        exec(compile(code, "<page>", "exec"), vars(page))
        assert capsys.readouterr().out == printed
    assert any(printed for _, printed in blocks)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
