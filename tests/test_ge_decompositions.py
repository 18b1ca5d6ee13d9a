"""Every decomposition that GE graphs get is the operator it stands for."""

import pytest
import torch
from ge_decomposition_cases import INF, NAN, OTHERS, REQUIRED, SAMPLES, SETTINGS, WHOLE, X
from torch import tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.compiler.ge_decompositions import MISSING, ge_decompositions
from sgl_npu.compiler.ge_formulas import integer_histogram

aten = torch.ops.aten
TABLE = ge_decompositions()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def is_functional(op):
    return not any(argument.is_out for argument in op._schema.arguments)


@pytest.mark.parametrize("op", MISSING, ids=str)
def test_every_operator_that_is_missing_has_a_decomposition(op):
    overloads = [op] if isinstance(op, torch._ops.OpOverload) else [getattr(op, name) for name in op.overloads()]
    assert any(overload in TABLE for overload in overloads)


def test_every_decomposition_has_samples():
    assert {op for op in TABLE if is_functional(op)} == SAMPLES.keys() | OTHERS


CASES = [
    pytest.param(op, args, settings, id=f"{op}-{number}{'-settings' if settings else ''}")
    for op, samples in SAMPLES.items()
    for settings in ([{}] if op not in REQUIRED else []) + ([SETTINGS[op]] if op in SETTINGS else [])
    for number, args in enumerate(samples)
]


@pytest.mark.parametrize("op, args, settings", CASES)
def test_a_decomposition_equals_its_operator(op, args, settings):
    expected = op(*args, **settings)
    torch.testing.assert_close(TABLE[op](*args, **settings), expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, args, settings", CASES)
def test_a_traced_decomposition_no_longer_has_the_operator(op, args, settings):
    """As AOTAutograd traces it: with symbolic sizes, down to operators that are not missing themselves."""
    places = [number for number, x in enumerate(args) if isinstance(x, torch.Tensor)]

    def call(*tensors):
        given = list(args)
        for number, x in zip(places, tensors, strict=True):
            given[number] = x
        return op(*given, **settings)

    tensors = [args[number] for number in places]
    gm = make_fx(call, decomposition_table=TABLE, tracing_mode="symbolic")(*tensors)
    left = {node.target for node in gm.graph.nodes} & {x for x in TABLE if is_functional(x)}
    assert not left, gm.graph
    torch.testing.assert_close(gm(*tensors), op(*args, **settings), equal_nan=True, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- histograms

# What lies outside of the bounds is not counted; the upper bound is in the last part.
HISTOGRAMS = {
    "one part per value": (torch.arange(-3, 20) % 8, 8, 0, 7),
    "several values per part": (torch.randint(-20, 40, (200,)), 4, 0, 16),
    "parts that are not whole": (torch.randint(-5, 20, (200,)), 7, 0, 10),
    "values outside": (tensor([-1, 0, 7, 8, 100, -100]), 8, 0, 7),
    "only values outside": (tensor([-1, 9]), 3, 0, 8),
    "negative bounds": (torch.randint(-10, 10, (200,)), 3, -10, -1),
    "two dimensions": (torch.randint(0, 8, (5, 7)), 8, 0, 7),
    "one value": (tensor(3), 4, 0, 3),
    "no values": (tensor([], dtype=torch.int64), 4, 0, 3),
    "bounds as floats": (torch.randint(0, 9, (50,)), 4, 0.0, 8.0),
    "one part": (torch.randint(-3, 9, (50,)), 1, 0, 5),
    "32 bits": (torch.randint(0, 9, (50,), dtype=torch.int32), 4, 0, 8),
    "8 bits": (torch.randint(0, 256, (50,), dtype=torch.uint8), 16, 0, 255),
}


@pytest.mark.parametrize("case", HISTOGRAMS)
def test_a_histogram_of_integers_is_that_of_the_same_floats(case):
    x, bins, low, high = HISTOGRAMS[case]
    found = integer_histogram(x, bins, low, high)
    assert found.dtype == x.dtype
    assert found.tolist() == torch.histc(x.double(), bins, low, high).tolist()


def test_a_histogram_with_a_part_per_value_counts_as_bincount():
    x = torch.randint(0, 12, (100,))
    assert torch.equal(integer_histogram(x, 12, 0, 11), torch.bincount(x, minlength=12))


def test_one_graph_of_a_histogram_serves_every_size():
    gm = make_fx(lambda x: aten.histc(x, 6, 0, 5), decomposition_table=TABLE, tracing_mode="symbolic")(torch.arange(40))
    assert not gm.graph.find_nodes(op="call_function", target=aten.histc.default)
    for size in (40, 3, 1):
        x = torch.randint(-2, 8, (size,))
        assert gm(x).tolist() == torch.histc(x.float(), 6, 0, 5).tolist()


@pytest.mark.parametrize(
    "x, low, high",
    [(X, 0, 3), (WHOLE, 0, 0), (WHOLE, 0.5, 3), (WHOLE, 3, 0), (WHOLE, -INF, INF), (WHOLE, 0, NAN)],
    ids=["floats", "bounds of the data", "a bound between integers", "bounds in reverse", "no bounds", "not a number"],
)
def test_other_histograms_stay_what_they_are(x, low, high):
    assert integer_histogram(x, 4, low, high) is NotImplemented


PADS = {
    "after": lambda x, n: (0, n - x.size(1)),
    "before": lambda x, n: (n - x.size(1), 0),
    "two dimensions": lambda x, n: (1, n - x.size(1), x.size(1), 2),
    "the first of two": lambda x, n: (0, 0, n - x.size(1), 0),
}


@pytest.mark.parametrize("name", PADS)
def test_padding_by_a_symbol_is_a_concatenation_for_every_size(name):
    def padded(x):
        return torch.nn.functional.pad(x, PADS[name](x, 40), value=2.0)

    gm = make_fx(padded, decomposition_table=TABLE, tracing_mode="symbolic")(torch.randn(5, 30))
    assert not gm.graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default)
    for size in (30, 3, 40):
        x = torch.randn(5, size)
        assert torch.equal(gm(x), padded(x))


def test_padding_by_numbers_stays_what_it_is():
    gm = make_fx(lambda x: aten.constant_pad_nd(x, (1, 2)), decomposition_table=TABLE, tracing_mode="symbolic")(X)
    assert gm.graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default)
