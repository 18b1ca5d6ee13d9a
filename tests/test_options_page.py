"""docs/options.md and docs/limits.md say what the code takes, and the example of the options runs."""

import torch
from page_code import code_blocks

from docs import limits
from docs.options import PAGE, TABLES
from docs.tables import filled


def test_the_tables_of_the_page_are_those_of_the_code():
    assert filled(PAGE, TABLES) == PAGE.read_text(), "run python -m docs.options"


def test_the_limits_are_those_of_the_kernels():
    assert filled(limits.PAGE, limits.TABLES) == limits.PAGE.read_text(), "run python -m docs.limits"


def test_every_rule_says_what_it_refuses():
    rows = [row for table in limits.TABLES.values() for row in table()[1:]]
    assert [row for row in rows if row[1] == "see the code"] == []


def test_the_example_of_the_page():
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    (code,) = code_blocks(PAGE)
    names = {"model": model}
    exec(compile(code, str(PAGE), "exec"), names)
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(names["compiled"](x, x, x, need_weights=False), model(x, x, x, need_weights=False))
