"""docs/serving.md says what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving.__main__ import RESULTS
from benchmarks.serving.page import PAGE, exceptions, page


def test_the_tables_of_the_page_are_those_of_the_results():
    stored = json.loads(RESULTS.read_text())
    assert page(PAGE.read_text(), stored) == PAGE.read_text(), "run python -m benchmarks.serving --no-measure"


def test_a_page_without_a_place_for_a_table_is_an_error():
    with pytest.raises(ValueError, match="0 places for the table 'serving_summary'"):
        page("no tables", {"families": {}, "measured": "today"})


def test_every_exception_has_a_reason():
    stored = json.loads(RESULTS.read_text())
    assert all(why for *_, why in exceptions(stored["families"]))
