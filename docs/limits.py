"""The tables of limits.md, made from the rule tables of the kernels: `python -m docs.limits` writes them into the page.

What a rule refuses is read from its source: the sentences it returns, with constants filled in and values of the call
left open.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.readme import Table
from docs.tables import filled
from sgl_npu.runtime.npu.attention_update import ATTENTION_UPDATE_RULES
from sgl_npu.runtime.npu.block_sparse_attention import BLOCK_SPARSE_RULES
from sgl_npu.runtime.npu.fusion_rules import FUSION_ATTENTION_RULES
from sgl_npu.runtime.npu.laser_attention import LASER_RULES
from sgl_npu.runtime.npu.npu_block_sparse_rules import NPU_BLOCK_SPARSE_RULES
from sgl_npu.runtime.npu.rain_fusion_attention import RAIN_FUSION_RULES
from sgl_npu.runtime.npu.rule import Rule
from sgl_npu.runtime.npu.rules import FIA_RULES
from sgl_npu.runtime.npu.sparse_block_estimate import ESTIMATE_RULES
from sgl_npu.runtime.npu.split_qkv_rmsnorm_rope import SPLIT_RULES

PAGE = Path(__file__).with_name("limits.md")
RULES: dict[str, Sequence[Rule]] = {
    "npu_fused_infer_attention_score": FIA_RULES,
    "npu_fusion_attention_v3": FUSION_ATTENTION_RULES,
    "npu_attention_update": ATTENTION_UPDATE_RULES,
    "laser_attention": LASER_RULES,
    "sparse_block_estimate": ESTIMATE_RULES,
    "block_sparse_attention": BLOCK_SPARSE_RULES,
    "rain_fusion_attention": RAIN_FUSION_RULES,
    "npu_block_sparse_attention": NPU_BLOCK_SPARSE_RULES,
    "split_qkv_rmsnorm_rope": SPLIT_RULES,
}


def limits(rules: Sequence[Rule]) -> Table:
    """A row per rule: its name, the sentences it refuses with, its source."""
    rows = [["rule", "refuses with", "source"]]
    for rule in rules:
        sentences = "<br>".join(dict.fromkeys(sentences_of(rule.check)))
        rows.append([f"`{rule.name}`", sentences.replace("|", "/") or "see the code", rule.source.replace("|", "/")])
    return rows


def sentences_of(check: Callable[..., str | None]) -> Iterator[str]:
    """Every text that a check returns, as it stands in its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(check)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            yield from _texts(node.value, check.__globals__)


def _texts(node: ast.expr, names: dict[str, Any]) -> Iterator[str]:
    if isinstance(node, ast.IfExp):
        yield from _texts(node.body, names)
        yield from _texts(node.orelse, names)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _texts(value, names)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(_part(part, names) for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        other = names.get(node.func.id)  # a check that several rules share
        if inspect.isfunction(other):
            yield from sentences_of(other)


def _part(part: ast.expr, names: dict[str, Any]) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    constant = names.get(part.value.id) if isinstance(part.value, ast.Name) and part.value.id.isupper() else None
    return "…" if constant is None else str(constant)


TABLES: dict[str, Callable[[], Table]] = {name: partial(limits, rules) for name, rules in RULES.items()}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE, TABLES))
