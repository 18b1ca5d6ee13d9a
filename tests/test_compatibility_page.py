"""docs/compatibility.md says what the platforms' tables and the pages of the runs say."""

import pytest

from docs.compatibility import PAGE, TABLES, kernels, models, rows_of
from docs.tables import filled


def test_the_tables_of_the_page_are_those_of_the_code_and_the_runs():
    assert filled(PAGE, TABLES) == PAGE.read_text(), "run python -m docs.compatibility"


def test_a_kernel_or_a_reason_stands_in_every_cell():
    cells = [cell for row in kernels()[1:] for cell in row[1:]]
    assert all(cell.startswith(("`", "decomposed: ")) for cell in cells)
    assert "decomposed: softcap = 50.0: the kernel has no softcap" in cells


def test_a_family_has_what_every_page_says_of_it():
    head, *rows = models()
    llama = next(dict(zip(head, row, strict=True)) for row in rows if row[0] == "hf/llama")
    assert llama["static"] == llama["npu bf16"] == "all" and llama["generate()"] == "same tokens"


def test_rows_are_read_as_far_as_the_table_goes():
    text = "before\n\n| a | b |\n| --- | --- |\n| 1 |  |\n\n| c |\n"
    assert rows_of(text) == [{"a": "1", "b": ""}]
    with pytest.raises(ValueError):
        rows_of("no table")
