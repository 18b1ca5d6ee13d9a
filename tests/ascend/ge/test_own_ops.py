"""Our operators around sgl-kernel-npu convert to the operators that GE has for them."""

import ge_numbers
import pytest
import torch
import torchair
from package_op_cases import TENSORS, arguments, lengths, outputs
from stand_in import ge, kernels
from torchair.configs.compiler_config import CompilerConfig

from sgl_npu.compiler import ge_converters
from sgl_npu.compiler.ge_converters import CONVERTERS, register
from sgl_npu.runtime.npu.package_ops import PACKAGE_OPS, ensure_package_ops

ensure_package_ops()
register()
for _name, _op in PACKAGE_OPS.items():
    kernels.give_kernel(f"sgl_npu::{_name}", _op.cpu)
NAMES = pytest.mark.parametrize("name", PACKAGE_OPS)


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    """GE operators that this machine has: those of the wheel `attentions` and of CANN."""
    import torchair.ge.ge_custom as ge_custom

    present = {row.ir for row in CONVERTERS.values()} | {
        "SplitV",
        "ConcatD",
        "Reshape",
        "RmsNorm",
        "RotaryMul",
        "Mul",
        "Add",
        "Neg",
    }
    # What CANN would answer (private, seen in torch_npu 2.13.0).
    known = lambda name: ("SUCCESS" if name in present else "ERROR", [], [], [])  # noqa: E731
    monkeypatch.setattr(ge_custom._torchair, "get_registered_ir_def", known, raising=False)
    torch._dynamo.reset()
    return present


def compiled(function):
    config = CompilerConfig()
    config.debug.run_eagerly = True
    return torch.compile(function, backend=torchair.get_npu_backend(compiler_config=config), fullgraph=True)


def convert(name, length, dynamic=()):
    """The GE graph of one call, whose eager run equals the CPU reference."""

    def run(*tensors):
        return getattr(torch.ops.sgl_npu, name)(*arguments(name, tensors))

    tensors = TENSORS[name](length)
    on_npu = [x.to("npu") for x in tensors]
    for index, axis in dynamic:
        torch._dynamo.mark_dynamic(on_npu[index], axis)
    with torch.no_grad(), ge.converted() as graphs:
        results = outputs(compiled(run)(*on_npu))
    for one, other in zip(results, outputs(run(*tensors)), strict=True):
        assert torch.equal(one.cpu(), other)
    (graph,) = graphs
    return graph


# Axes that carry the sequence length, per tensor.
SEQUENCE = {
    "laser_attention": [(0, 2), (1, 2), (2, 2)],
    "sparse_block_estimate": [(0, 2), (1, 2)],
    "block_sparse_attention": [(0, 2), (1, 2), (2, 2)],
    "rain_fusion_attention": [(0, 0), (1, 0), (2, 0)],
    "split_qkv_rmsnorm_rope": [(0, 0), (1, 0), (2, 0)],
}
EXPECTED = {name: {row.ir: 1} for name, row in CONVERTERS.items() if row.ir is not None} | {
    "split_qkv_rmsnorm_rope": {"RmsNorm": 2, "RotaryMul": 2}
}


@NAMES
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_operator_converts(name, dynamic):
    found = ge.ops(convert(name, lengths(name)[0], SEQUENCE[name] if dynamic else ()))
    for operator, count in EXPECTED[name].items():
        assert found[operator] == count, found


def attributes(graph, operator):
    """Every attribute and every connected input of the one node of this type."""
    (node,) = (op for op in graph.graph.op if op.type == operator)
    named = {name: attr for name, attr in node.attr.items() if not name.startswith("_")}
    found = {name: getattr(attr, attr.WhichOneof("value")) for name, attr in named.items()}
    return found | {desc.name: source for desc, source in zip(node.input_desc, node.input, strict=True) if source}


@pytest.mark.parametrize(
    ("name", "settings", "connected"),
    [
        (
            "laser_attention",
            {"head_num": 4, "input_layout": b"BNSD", "pre_tokens": 5, "next_tokens": 1, "is_highPrecision": True},
            {"query", "key", "value"},
        ),
        (
            "sparse_block_estimate",
            {"num_heads": 4, "num_key_value_heads": 2, "stride": 8, "sparse_size": 128, "scale_value": 0.015625,
             "causal": True, "keep_sink": True, "keep_recent": True, "row_sparse": 1.0},
            {"query", "key"},
        ),
        (
            "block_sparse_attention",
            {"num_heads": 4, "num_key_value_heads": 2, "scale_value": 0.125, "sparse_size": 128, "inner_precise": 1,
             "causal": True, "sparse_mode": 0, "pre_tokens": 214748647, "next_tokens": 0},
            {"query", "key", "value", "sparse_mask", "sparse_count_table"},
        ),
        (
            "rain_fusion_attention",
            {"numKeyValueHeads": 2, "qInputLayout": b"TND", "kvInputLayout": b"TND", "scaleValue": 0.125,
             "maskType": 0, "innerPrecise": 0, "blockSize": 0},
            {"query", "key", "value", "selectIdx", "selectNumIdx", "blockShape", "actualSeqLengths",
             "actualSeqLengthsKv"},
        ),
    ],
)  # fmt: skip
def test_attributes_and_inputs_are_those_of_the_operator(name, settings, connected):
    found = attributes(convert(name, lengths(name)[0]), CONVERTERS[name].ir)
    assert {key: found[key] for key in settings} == settings
    assert connected == {key for key, value in found.items() if isinstance(value, str)}


def test_results_of_the_laser_operator_change_places():
    graph = convert("laser_attention", 768).graph
    output = next(op for op in graph.op if op.type == "NetOutput")
    assert list(output.input) == ["LaserAttention:1", "LaserAttention:0"]


def test_lengths_that_follow_a_dynamic_size_are_computed_in_the_graph():
    graph = convert("rain_fusion_attention", 300, SEQUENCE["rain_fusion_attention"])
    found = attributes(graph, "RainFusionAttention")
    sources = {op.name: op.type for op in graph.graph.op}
    lists = [found[name].partition(":")[0] for name in ("actualSeqLengths", "actualSeqLengthsKv")]
    assert [sources[name] for name in lists] == ["Pack", "Pack"]


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("rope", [16, 8])
@pytest.mark.parametrize("norm", ["norm and bias", "norm", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plain_operators_of_split_qkv_rmsnorm_rope_compute_it(neox, rope, norm, dtype):
    qkv, sin, cos = (torch.randn(6, size, dtype=dtype) for size in (128, rope, rope))
    optional = list(torch.randn({"norm and bias": 4, "norm": 2, "none": 0}[norm], 16, dtype=dtype).unbind())

    def run(*tensors):
        qkv, sin, cos, *given = [*tensors, *[None] * (7 - len(tensors))]
        eps = None if norm == "none" else 1e-3
        return torch.ops.sgl_npu.split_qkv_rmsnorm_rope(qkv, sin, cos, 64, 32, 16, eps, *given, neox)

    tensors = [qkv, sin, cos, *optional]
    on_npu = [x.to("npu") for x in tensors]
    torch._dynamo.mark_dynamic(on_npu[0], 0)
    with torch.no_grad(), ge.converted() as graphs:
        compiled(run)(*on_npu)
    for one, other in zip(ge_numbers.run(graphs[0].graph, tensors), run(*tensors), strict=True):
        # CANN's operators round to the dtype that the model computes in, as the model does.
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 8e-2)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
        assert one.dtype == dtype


# ---------------------------------------------------------------- what cannot be converted


def failure(function, *tensors):
    with pytest.raises(Exception) as error, torch.no_grad():
        compiled(function)(*tensors)
    return str(error.value)


def test_without_the_operator_the_error_says_what_to_install(operators):
    operators.discard("LaserAttention")
    tensors = [x.to("npu") for x in TENSORS["laser_attention"](256)]
    message = failure(lambda q, k, v: torch.ops.sgl_npu.laser_attention(q, k, v, 0.1), *tensors)
    assert "GE: no operator LaserAttention" in message
    assert "./build.sh -a attentions" in message and "inner='npugraph_ex'" in message


def test_padding_that_is_computed_in_the_graph_is_refused():
    def padded(query, key, value):
        return torch.ops.sgl_npu.laser_attention(query, key, value, 0.1, query.shape[2] // 256)

    tensors = [x.to("npu") for x in TENSORS["laser_attention"](768)]
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 2)
    assert "kv_padding of sgl_npu::laser_attention is symbolic; it must be a constant" in failure(padded, *tensors)


# ---------------------------------------------------------------- registering


def test_registering_again_changes_nothing(monkeypatch):
    monkeypatch.setattr(torchair, "register_fx_node_ge_converter", None)
    register()


@pytest.mark.parametrize(
    ("installed", "left"),
    [
        (set(), set()),
        ({"attentions"}, set()),
        ({"attentions", "ge.custom_op"}, {"split_qkv_rmsnorm_rope"}),
        ({"ge.custom_op"}, set(CONVERTERS) - {"rain_fusion_attention", "npu_block_sparse_attention"}),
    ],
    ids=["older CANN", "older CANN and the wheel", "callbacks and the wheel", "callbacks"],
)
def test_operators_without_an_ir_are_left_to_a_callback_where_there_are_callbacks(monkeypatch, installed, left):
    monkeypatch.setattr(ge_converters, "_is_installed", installed.__contains__)
    assert {name for name, row in CONVERTERS.items() if ge_converters._left_to_callback(row)} == left
