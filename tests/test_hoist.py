# ruff: noqa: E501
"""Computed lengths become inputs of the graph, behind the others; everything else stays where it is."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.compiler.graph_text import graph_text
from sgl_npu.passes.hoist import hoist_lengths, hoist_reads
from sgl_npu.runtime.length_at import length_at
from sgl_npu.runtime.npu import ensure_ops

ensure_ops()
FIA, FIA_V2 = torch.ops.npu.npu_fused_infer_attention_score, torch.ops.npu.npu_fused_infer_attention_score_v2
HEADS, SIZE = 2, 64


def packed(query, key, rows, keys):
    """Version 2 over sequences end to end; `rows` and `keys` are their cumulative lengths."""
    settings = {"num_query_heads": HEADS, "num_key_value_heads": HEADS, "input_layout": "TND"}
    return FIA_V2(query, key, key, actual_seq_qlen=rows, actual_seq_kvlen=keys, **settings)[0]


def padded(query, key, rows, keys):
    settings = {"num_heads": HEADS, "num_key_value_heads": HEADS, "input_layout": "BNSD"}
    return FIA(query, key, key, actual_seq_lengths=rows, actual_seq_lengths_kv=keys, **settings)[0]


def sequences(length, batch=2):
    return torch.randn(batch, length, HEADS, SIZE, dtype=torch.bfloat16)


def two(x):
    length = x.shape[1]
    return packed(x.flatten(0, 1), x.flatten(0, 1), [length, 2 * length], [length, 2 * length])


def cached(x, cache):
    rows, keys = x.shape[1], x.shape[1] + cache.shape[1]
    key = torch.cat((cache, x), 1).flatten(0, 1)
    return packed(x.flatten(0, 1), key, [rows, 2 * rows], [keys, 2 * keys])


def traced(function, *inputs):
    return make_fx(function, tracing_mode="symbolic")(*inputs)


def named(text, gm):
    """The graph's text with the symbols called as they are in it, in order of appearance: torch numbers them."""
    symbols = dict.fromkeys(
        size.node.expr
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(node.meta["val"], torch.Tensor)
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    )
    for number, symbol in enumerate(symbols):
        text = text.replace(str(symbol), "STUV"[number])
    return text


def test_lengths_that_are_computed_become_inputs_behind_the_others():
    gm = traced(two, sequences(48))
    assert hoist_lengths(gm) is not None
    gm.graph.lint()
    assert_expected_inline(
        named(graph_text(gm), gm),
        """\
input: bf16[S, T, S, U]
input1: T
input2: 2*T
sym_size: S = aten.sym_size.int(input, 0)
sym_size1: T = aten.sym_size.int(input, 1)
mul: S*T = mul(sym_size, sym_size1)
sym_size2: U = aten.sym_size.int(input, 3)
sym_size3: S = aten.sym_size.int(input, 2)
view: bf16[S*T, S, U] = aten.view(input, [mul, sym_size3, sym_size2])
mul1: S*T = mul(sym_size, sym_size1)
view1: bf16[S*T, S, U] = aten.view(input, [mul1, sym_size3, sym_size2])
npu_fused_infer_attention_score_v2: tuple = npu.npu_fused_infer_attention_score_v2(view, view1, view1, actual_seq_qlen=[input1, input2], actual_seq_kvlen=[input1, input2], num_query_heads=2, num_key_value_heads=2, input_layout=TND)
getitem: bf16[S*T, S, U] = getitem(npu_fused_infer_attention_score_v2, 0)
return getitem""",
    )


def test_every_expression_becomes_one_input():
    gm = traced(cached, sequences(3), sequences(45))
    assert hoist_lengths(gm) is not None
    inputs = gm.graph.find_nodes(op="placeholder")[2:]
    assert_expected_inline(
        "\n".join(named(f"{x.name}: {x.meta['val']}", gm) for x in inputs),
        """\
length_0: T
length_1: 2*T
length_2: V + T
length_3: 2*V + 2*T""",
    )


LENGTHS = [(48, 1), (7, 1), (1, 1), (130, 3)]


@pytest.mark.parametrize("function, inputs", [(two, 1), (cached, 2)], ids=["[S, 2S]", "[S + P, 2(S + P)]"])
def test_one_graph_serves_every_length(function, inputs):
    gm = traced(function, *[sequences(48 + i) for i in range(inputs)])
    compute = hoist_lengths(gm)
    for length, step in LENGTHS:
        given = [sequences(length + i * step) for i in range(inputs)]
        torch.testing.assert_close(gm(*given, *compute(*given)), function(*given), rtol=0, atol=0)


DERIVED = {
    "a product": lambda s: [s * 2],
    "a difference": lambda s: [s - 1],
    "a quotient": lambda s: [s // 3],
    "a remainder": lambda s: [s % 5 + 1],
    "rounded up": lambda s: [(s + 15) // 16 * 16],
    "a square": lambda s: [s * s],
    "a product of three": lambda s: [s * (s + 1) * (s + 2) // 6],
    "the larger of two": lambda s: [torch.sym_max(s, 4)],
    "one twice": lambda s: [s * 2, s * 2],
    "one beside a number": lambda s: [3, s * 2],
}
NOT_ARITHMETIC = {"the larger of two"}


def listed(lengths):
    """A graph that calls the op for its shape alone: what is in the list need not fit the tensors."""

    def function(x):
        return padded(x, x, None, lengths(x.shape[2]))

    return traced(function, torch.randn(2, HEADS, 48, SIZE, dtype=torch.bfloat16))


@pytest.mark.parametrize("case", DERIVED)
def test_the_values_of_the_new_inputs_are_those_of_the_lengths(case):
    gm = listed(DERIVED[case])
    compute = hoist_lengths(gm)
    if case in NOT_ARITHMETIC:
        assert compute is None
        return
    (node,) = [x for x in gm.graph.nodes if x.target is FIA.default]
    given = node.kwargs["actual_seq_lengths_kv"]
    new = gm.graph.find_nodes(op="placeholder")[1:]
    assert all(not isinstance(x, torch.fx.Node) or x in new for x in given)
    for size in (48, 7, 1):
        x = torch.randn(2, HEADS, size, SIZE)
        values = dict(zip(new, compute(x), strict=True))
        assert [values.get(n, n) for n in given] == DERIVED[case](size)
        assert all(type(value) is int for value in values.values())


# ---------------------------------------------------------------- what stays

UNCHANGED = {
    "no lists": (lambda x: padded(x, x, None, None), 48),
    "constants": (lambda x: padded(x, x, [48, 48], [48, 48]), 48),
    "an empty list": (lambda x: padded(x, x, [], []), 48),
    "another op": (lambda x: x.view(x.shape[0] * x.shape[1], -1) * (2 * x.shape[2]), 48),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_graphs_without_computed_lengths_stay(case):
    function, size = UNCHANGED[case]
    gm = traced(function, torch.randn(2, HEADS, size, SIZE, dtype=torch.bfloat16))
    before = graph_text(gm)
    assert hoist_lengths(gm) is None
    assert graph_text(gm) == before


def test_lengths_that_are_inputs_stay():
    def function(x, length):
        return padded(x, x, None, [length, length])

    gm = traced(function, torch.randn(2, HEADS, 48, SIZE, dtype=torch.bfloat16), 30)
    before = graph_text(gm)
    assert hoist_lengths(gm) is None
    assert graph_text(gm) == before


def counted(x, lengths):
    """One length is data, one is arithmetic."""
    first, _ = lengths.tolist()
    torch._check(first >= 0)
    torch._check(first <= 1000)
    return padded(x, x, None, [first, x.shape[2] - 1])


def test_a_length_that_depends_on_data_stays_and_its_neighbour_does_not():
    x, lengths = torch.randn(2, HEADS, 48, SIZE, dtype=torch.bfloat16), torch.tensor([30, 47])
    gm = traced(counted, x, lengths)
    compute = hoist_lengths(gm)
    (node,) = [n for n in gm.graph.nodes if n.target is FIA.default]
    first, second = node.kwargs["actual_seq_lengths_kv"]
    assert first.op == "call_function" and second.op == "placeholder"
    assert list(compute(x, lengths)) == [47]
    torch.testing.assert_close(gm(x, lengths, *compute(x, lengths)), counted(x, lengths), rtol=0, atol=0)


# ---------------------------------------------------------------- lengths in a tensor


def documents(x, starts, other):
    """Two layers over the documents of one tensor, a third over those of another that the graph computes."""
    for _ in range(2):
        ends = [length_at(starts, i) for i in (1, 2)]
        x = packed(x, x, ends, ends)
    ends = [length_at(other + 0, i) for i in (1, 2)]
    return packed(x, x, ends, ends)


def test_entries_of_an_input_become_inputs_and_the_tensor_is_read_once():
    x, starts = torch.randn(24, HEADS, SIZE, dtype=torch.bfloat16), torch.tensor([0, 9, 24])
    gm = make_fx(documents, tracing_mode="fake")(x, starts, starts)
    compute = hoist_reads(gm)
    assert len(gm.graph.find_nodes(op="placeholder")) == 5
    left = gm.graph.find_nodes(op="call_function", target=length_at)
    assert len(left) == 2 and all(node.args[0].op == "call_function" for node in left)
    for ends in ([0, 9, 24], [0, 20, 24]):
        starts = torch.tensor(ends)
        values = compute(x, starts, starts)
        assert values == ends[1:]
        torch.testing.assert_close(gm(x, starts, starts, *values), documents(x, starts, starts))


def test_without_lengths_in_a_tensor_nothing_is_read():
    assert hoist_reads(traced(two, sequences(24))) is None
